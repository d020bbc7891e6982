"""Every Triton kernel with every launch configuration compiles ahead of time, and what it takes of a GPU is bounded.

No GPU is needed. The compiler runs in a child process per compute capability, because this one may be an interpreter
(see `conftest.py`). A kernel takes part by `compile_cases` in its module and a line in `aot.MODULES`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import pytest

from baton.kernels.triton import launch_table
from baton.kernels.triton.launch_table import find_launch, gpus_for

CAPABILITIES = (80, 90)
SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may have."""
FIXED_BY_THE_MODEL = {"chunk_size", "num_words", "shard_size", "vocab"}
"""Numbers beside strides that may be compiled in. A chunk is a multiple of 16 tokens; words are those of a block."""
_DEADLINE_S = 900
"""About a minute on two free cores when nothing is in Triton's cache; generous, because others may use the cores."""


def _environment() -> dict[str, str]:
    """This process's, for one that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


def _compile_all(capability: int) -> tuple[dict[str, Any], ...]:
    done = subprocess.run(
        [sys.executable, "-m", "baton.kernels.triton.aot", str(capability)],
        env=_environment(),
        capture_output=True,
        text=True,
        timeout=_DEADLINE_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return tuple(map(json.loads, done.stdout.splitlines()))


@cache
def _all_reports() -> dict[int, tuple[dict[str, Any], ...]]:
    with ThreadPoolExecutor(len(CAPABILITIES)) as pool:
        return dict(zip(CAPABILITIES, pool.map(_compile_all, CAPABILITIES), strict=True))


def reports(capability: int) -> tuple[dict[str, Any], ...]:
    """One `aot.Report` per case; all children work at once, at the first call."""
    return _all_reports()[capability]


@pytest.fixture(params=CAPABILITIES, ids="sm_{}".format)
def capability(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.mark.timeout(_DEADLINE_S + 20)
def test_every_case_compiles(capability: int) -> None:
    names = [report["name"] for report in reports(capability)]
    assert len(names) == len(set(names)) > 0
    kernels = {name.split("/")[0] for name in names}
    assert set(launch_table.TABLE) <= kernels, "each kernel of the launch table has cases"


@pytest.mark.timeout(_DEADLINE_S + 20)
def test_shared_memory_fits(capability: int) -> None:
    used = {report["name"]: report["shared_bytes"] for report in reports(capability)}
    assert {name: size for name, size in used.items() if size > SHARED_LIMIT_BYTES[capability]} == {}


@pytest.mark.timeout(_DEADLINE_S + 20)
def test_registers_do_not_spill(capability: int) -> None:
    spilled = {
        report["name"]: (report["spill_bytes"], report["registers"])
        for report in reports(capability)
        if report["spill_bytes"] > report["spill_limit_bytes"]
    }
    assert spilled == {}
    loose = {report["name"] for report in reports(capability) if report["spill_limit_bytes"]}
    # What may spill: tiles of more than 64 query heads per KV head; fixed splits of heads of 256, or of fp32.
    rare = ("/m128/", "fixed_attention/float32/", "fixed_attention/bfloat16/m64/d256")
    assert [name for name in loose if not any(part in name for part in rare)] == []


@pytest.mark.timeout(_DEADLINE_S + 20)
def test_the_instructions_that_make_it_fast_are_there(capability: int) -> None:
    assert {report["name"]: report["missing"] for report in reports(capability) if report["missing"]} == {}


@pytest.mark.timeout(300)
def test_nothing_is_fused_where_bits_must_be_those_of_the_reference(capability: int) -> None:
    assert {report["name"]: report["unwanted"] for report in reports(capability) if report["unwanted"]} == {}


def _describe_cases() -> list[dict[str, Any]]:
    """Name, expected instructions and specialising numbers of each case for Hopper."""
    code = """
import json
from baton.kernels.triton import aot
for case in aot.cases(90):
    numbers = [p.name for p in case.kernel.params if case.types.get(p.name) in ("i32", "i64")]
    special = [p.name for p in case.kernel.params if p.name in numbers and not p.do_not_specialize]
    print(json.dumps({"name": case.name, "uses": case.uses.get(90, ()), "special": special}))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], env=_environment(), capture_output=True, text=True, timeout=120, check=True
    )
    return list(map(json.loads, done.stdout.splitlines()))


def test_hopper_cases_expect_wgmma_and_tma_and_no_number_of_a_step_specialises() -> None:
    described = _describe_cases()
    uses = {case["name"]: case["uses"] for case in described}
    half = [name for name in uses if name.startswith(("prefill_attention/b", "fixed_attention/b"))]
    assert half
    assert all("wgmma.mma_async" in uses[name] for name in half)
    assert "cp.async.bulk.tensor" in uses["prefill_attention/bfloat16/d128/tma"]
    # Only what a model fixes may be compiled in; a length that is would compile anew in the middle of serving.
    special = {name for case in described for name in case["special"]}
    strides = ("_row", "_head", "_token", "_pair", "_layer", "_block")
    assert {name for name in special if "stride" not in name and not name.endswith(strides)} == FIXED_BY_THE_MODEL


def test_a_gpu_is_looked_up_by_name_then_by_family() -> None:
    assert gpus_for("NVIDIA H200", 90) == ("NVIDIA H200", "sm_90", "sm_80")
    assert gpus_for("NVIDIA A10", 86) == ("NVIDIA A10", "sm_80")
    table = launch_table.TABLE["prefill_attention"]
    hopper = find_launch("prefill_attention", gpus_for("NVIDIA H200", 90), "bfloat16", (128, 0))
    assert hopper is table["sm_90", "half", (128, 0)]
    exact = find_launch("prefill_attention", gpus_for("NVIDIA H200", 90), "float32", (128, 0))
    assert exact is table["sm_80", "float32", (128, 0)]
    with pytest.raises(ValueError, match=r"no launch configuration for bfloat16, bucket \(48, 0\)"):
        find_launch("prefill_attention", gpus_for("NVIDIA H200", 90), "bfloat16", (48, 0))
