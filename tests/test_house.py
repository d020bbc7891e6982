"""The rules of the house: who may import whom, what stays pure, what stays light, what must not be there at all."""

from __future__ import annotations

import ast
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "src" / "baton"
COMPONENTS = ("cluster", "decode_worker", "kernels", "kv_transfer", "prefill_worker", "proto", "router")
BASE = (
    "clock",
    "collector",
    "config",
    "config_admission",
    "config_errors",
    "config_routing",
    "config_section",
    "config_tracing",
    "config_values",
    "errors",
    "fault_events",
    "fault_rules",
    "faults",
    "log",
    "metrics",
    "metrics_server",
    "placement",
    "tracing",
    "vllm_metrics",
)

# What each room may import from baton, besides itself: a room, or one module of it.
MAY_IMPORT: dict[str, tuple[str, ...]] = {
    "cluster": (*COMPONENTS, "worker", "engine", "state", *BASE),
    "router": (
        "proto",
        "state",
        "engine.block_journal",
        "engine.prefix_cache",
        "engine.tokenizer",
        "engine.request",
        *BASE,
    ),
    "prefill_worker": ("worker", "kv_transfer", "engine", "proto", *BASE),
    "decode_worker": ("worker", "kv_transfer", "engine", "proto", *BASE),
    # What the two kinds of worker share.
    "worker": ("kv_transfer", "engine", "proto", "state", *BASE),
    "kv_transfer": ("engine.kv_layout", "proto", *BASE),
    "engine": ("kernels", *BASE),
    "kernels": (),
    "proto": ("faults",),
    # What several routers share.
    "state": ("proto", *BASE),
    **dict.fromkeys(BASE, BASE),
}
# The one file that turns messages into dataclasses needs the dataclasses.
EXTRA = {"proto/codec.py": ("engine.request", "engine.kv_layout")}

PURE = (
    "cluster/chaos/growth.py",
    "cluster/chaos/members.py",
    "cluster/chaos/prompts.py",
    "cluster/chaos/report.py",
    "cluster/chaos/scenarios.py",
    "cluster/columns.py",
    "cluster/controller.py",
    "cluster/explain_text.py",
    "cluster/launchers/node_choice.py",
    "cluster/launchers/rank_exits.py",
    "cluster/launchers/rank_names.py",
    "cluster/loadgen/answer.py",
    "cluster/loadgen/arrivals.py",
    "cluster/loadgen/lengths.py",
    "cluster/loadgen/load_class.py",
    "cluster/loadgen/option_text.py",
    "cluster/loadgen/plan.py",
    "cluster/loadgen/prompts.py",
    "cluster/loadgen/records.py",
    "cluster/loadgen/result.py",
    "cluster/loadgen/sessions.py",
    "cluster/loadgen/slo.py",
    "cluster/loadgen/summary.py",
    "cluster/loadgen/trace.py",
    "cluster/loadgen/workload.py",
    "cluster/registry_state.py",
    "cluster/rendezvous.py",
    "cluster/top/rows.py",
    "cluster/top/sample.py",
    "cluster/top/table_text.py",
    "cluster/trace_text.py",
    "decode_worker/phases.py",
    "engine/block_journal.py",
    "engine/block_pool.py",
    "engine/core_plan.py",
    "engine/graph_buckets.py",
    "engine/kv_layout.py",
    "engine/kv_memory.py",
    "engine/partition.py",
    "engine/prefix_cache.py",
    "engine/request.py",
    "engine/request_check.py",
    "engine/scheduler.py",
    "engine/sequence_slots.py",
    "engine/step_message.py",
    "engine/step_packing.py",
    "fault_events.py",
    "fault_rules.py",
    "kv_transfer/handover.py",
    "kv_transfer/handover_receiver.py",
    "kv_transfer/handover_sender.py",
    "kv_transfer/plan.py",
    "kv_transfer/reservation.py",
    "kv_transfer/transports/arena.py",
    "kv_transfer/transports/choice.py",
    "kv_transfer/transports/failures.py",
    "kv_transfer/transports/rate_limiter.py",
    "router/admin_views.py",
    "router/decisions.py",
    "router/admission/admission.py",
    "router/admission/capacity.py",
    "router/admission/early_refusal.py",
    "router/admission/fair_queue.py",
    "router/admission/output_lengths.py",
    "router/admission/pace.py",
    "router/admission/rate_limit.py",
    "router/admission/slot_shares.py",
    "router/admission/tenants.py",
    "router/admission/ticket.py",
    "router/attainment.py",
    "router/block_feed.py",
    "router/cluster_facts.py",
    "router/costs/estimate.py",
    "router/costs/least_squares.py",
    "router/costs/model.py",
    "router/costs/outcomes.py",
    "router/costs/step_cost.py",
    "router/costs/transfer_cost.py",
    "router/ejection.py",
    "router/idempotency.py",
    "router/policy.py",
    "router/predictions.py",
    "router/prefix_index.py",
    "router/quarantine.py",
    "router/request_ids.py",
    "router/retries.py",
    "router/routing/costs.py",
    "router/routing/decision.py",
    "router/routing/facts.py",
    "router/routing/filters.py",
    "router/routing/handover_choice.py",
    "router/routing/picker.py",
    "router/routing/policies.py",
    "router/routing/prior_costs.py",
    "router/routing/profile.py",
    "router/routing/recent_work.py",
    "router/routing/scene.py",
    "router/routing/scorers/affinity.py",
    "router/routing/scorers/balance.py",
    "router/routing/scorers/health.py",
    "router/routing/scorers/load.py",
    "router/routing/scorers/memory.py",
    "router/routing/scorers/pending.py",
    "router/routing/scorers/prefix.py",
    "router/routing/scorers/queue.py",
    "router/routing/scorers/topology.py",
    "router/salt.py",
    "router/timelines.py",
    "router/timing.py",
    "router/view_merge.py",
    "state/rate_limits.py",
    "worker/block_log.py",
    "worker/parts.py",
    "worker/slowness.py",
)
IMPURE_MODULES = {"torch", "grpc", "ray", "asyncio", "time"}
THIRD_PARTY_OF_BASE = {"pydantic", "yaml", "prometheus_client", "huggingface_hub", "opentelemetry"}


def _modules() -> Iterator[tuple[str, Path]]:
    """("engine/request.py", its path) of every file we wrote below src/baton."""
    for room in (*COMPONENTS, "engine", "state", "worker", ""):
        for path in sorted((PACKAGE / room).rglob("*.py") if room else PACKAGE.glob("*.py")):
            if not path.stem.endswith(("_pb2", "_pb2_grpc")):
                yield str(path.relative_to(PACKAGE)), path


MODULES = dict(_modules())


def _imports(path: Path) -> Iterator[str]:
    """Dotted names a file imports anywhere in it; `from a import b` gives a.b."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            assert node.module is not None
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def _room(name: str) -> str:
    return name.split("/")[0].removesuffix(".py")


@pytest.mark.parametrize("name", MODULES)
def test_imports_point_down(name: str) -> None:
    room = _room(name)
    if room == "__init__":
        return
    allowed = (*MAY_IMPORT[room], room, *EXTRA.get(name, ()))
    for imported in _imports(MODULES[name]):
        if imported.split(".")[0] != "baton":
            continue
        inside = imported.removeprefix("baton").removeprefix(".")
        # `import baton` itself tells only where the package is.
        fine = not inside or any(inside == room or inside.startswith(room + ".") for room in allowed)
        assert fine, f"{name} imports {imported}; allowed: {', '.join(allowed)}"


@pytest.mark.parametrize("name", [f"{module}.py" for module in BASE])
def test_the_base_needs_little(name: str) -> None:
    allowed = {*sys.stdlib_module_names, *THIRD_PARTY_OF_BASE, "baton"}
    assert {imported.split(".")[0] for imported in _imports(MODULES[name])} <= allowed


@pytest.mark.parametrize("name", PURE)
def test_pure_files_are_pure(name: str) -> None:
    assert name in MODULES, f"{name} is missing; if it moved, correct the list"
    impure = {imported.split(".")[0] for imported in _imports(MODULES[name])} & IMPURE_MODULES
    assert not impure, f"{name} imports {', '.join(sorted(impure))}"


@pytest.mark.parametrize("name", MODULES)
def test_nothing_unpickles(name: str) -> None:
    path = MODULES[name]
    forbidden = {"pickle", "cloudpickle", "dill", "marshal", "shelve"}
    assert not {imported.split(".")[0] for imported in _imports(path)} & forbidden
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) != ("torch", "load"), f"{name}:{node.lineno} uses torch.load"


@pytest.mark.parametrize("component", COMPONENTS)
def test_every_component_is_linked_into_the_package(component: str) -> None:
    link = PACKAGE / component
    assert link.is_symlink()
    assert str(link.readlink()) == f"../../{component}"
    assert link.resolve() == ROOT / component


@pytest.mark.parametrize("component", COMPONENTS)
def test_components_have_no_init(component: str) -> None:
    assert list((ROOT / component).rglob("__init__.py")) == []


def _run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("room", ["cluster", "router"])
def test_router_and_cluster_load_without_torch(room: str) -> None:
    names = [
        "baton." + name.removesuffix(".py").replace("/", ".")
        for name in MODULES
        if _room(name) == room and not name.startswith("cluster/launchers/ray")
    ]
    assert names
    code = f"""
import importlib, sys
for name in {names}:
    importlib.import_module(name)
    assert "torch" not in sys.modules, name
    assert "ray" not in sys.modules, name
"""
    _run(code)


def test_help_takes_less_than_half_a_second_of_cpu() -> None:
    def measure_s() -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run(
            [sys.executable, "-m", "baton.cluster.cli", "--help"],
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        assert done.returncode == 0, done.stderr
        assert "status" in done.stdout
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    # The least of three: a shared machine adds to CPU time through cold caches, and never takes from it.
    assert min(measure_s() for _ in range(3)) < 0.5


def test_generated_protobuf_is_that_of_the_proto_files() -> None:
    pytest.importorskip("grpc_tools")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gen_proto.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
