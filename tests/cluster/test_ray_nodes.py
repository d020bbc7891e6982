"""Launcher `ray` on a Ray cluster of two nodes on this machine: where ranks go, and what one rank's death does."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import ray
from ray.cluster_utils import Cluster
from stub_actor import BrokenActor, LateActor, StubActor

import baton
from baton.cluster.controller import StartInstance
from baton.cluster.launchers.ray import RayHost
from baton.cluster.launchers.ray_launcher import RayLauncher
from baton.config import ClusterConfig, load_config
from baton.errors import UnavailableError

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

DEADLINE_S = 60.0
NODE_CPUS = 4
REGISTRY = "127.0.0.1:1"


@pytest.fixture(scope="module", autouse=True)
def _two_nodes() -> Iterator[None]:
    paths = [str(Path(baton.__file__).resolve().parent.parent), str(Path(__file__).parent)]
    settings = {
        "PYTHONPATH": os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")]),
        "RAY_enable_worker_prestart": "0",
        "RAY_prestart_worker_first_driver": "0",
        "RAY_usage_stats_enabled": "0",
        # Else Ray makes a token for itself in the home of whoever runs this.
        "RAY_AUTH_MODE": "disabled",
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in settings.items():
            patch.setenv(name, value)
        node: dict[str, Any] = {"num_cpus": NODE_CPUS, "object_store_memory": 80 << 20}
        cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        try:
            cluster.add_node(**node)
            ray.init(address=cluster.address, namespace="baton", log_to_driver=False, configure_logging=False)
            yield
        finally:
            ray.shutdown()
            cluster.shutdown()


def config_of(**overrides: object) -> ClusterConfig:
    pools = {
        "prefill.host": "auto",
        "decode.host": "auto",
        "insecure": True,
        "ray.cpus_per_rank": 1,
        "stop_grace_s": 2.0,
    }
    return load_config(None, {**pools, **overrides})


class Ranks:
    """What the ranks of an instance say of themselves, by rank."""

    def __init__(self, launcher: RayLauncher, instance_id: str) -> None:
        actors = [rank.actor for rank in launcher._launched[instance_id].ranks]
        told = ray.get([actor.where.remote() for actor in actors], timeout=DEADLINE_S)
        self.pids = [pid for pid, _, _ in told]
        self.nodes = [node for _, node, _ in told]
        self.placements = [placement for _, _, placement in told]

    def left(self) -> list[int]:
        """Processes of it that still run; Ray's workers retitle themselves while they hold an actor."""
        left = []
        for pid in self.pids:
            with suppress(OSError):
                if b"StubActor" in Path(f"/proc/{pid}/cmdline").read_bytes():
                    left.append(pid)
        return left


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {DEADLINE_S:.0f} s for {what}"
        await asyncio.sleep(0.02)


async def until_dead(launcher: RayLauncher, instance_id: str) -> str:
    """Its exit text, looking as often as the controller does."""
    deadline_s = time.monotonic() + DEADLINE_S
    while True:
        for observed in await launcher.observe():
            if observed.instance_id == instance_id and not observed.alive:
                return observed.exit_text
        assert time.monotonic() < deadline_s, f"waited {DEADLINE_S:.0f} s for the death of {instance_id}"
        await asyncio.sleep(0.1)


def start(role: str, index: int) -> StartInstance:
    return StartInstance(f"{role}-{index}", role, index)


async def test_stages_are_on_nodes_of_their_own_and_tensor_ranks_together(tmp_path: Path) -> None:
    config = config_of(**{"decode.tensor_parallel": 2, "decode.pipeline_parallel": 2})
    launcher = RayLauncher(config, tmp_path, 0.0, run="r1", actor_class=StubActor)
    try:
        await launcher.start(start("decode", 0), REGISTRY)
        ranks = Ranks(launcher, "decode-0")
        assert [placement["rank"] for placement in ranks.placements] == [0, 1, 2, 3]
        assert {placement["num_ranks"] for placement in ranks.placements} == {4}
        assert len({placement["start_id"] for placement in ranks.placements}) == 1
        assert ranks.nodes[0] == ranks.nodes[1] != ranks.nodes[2] == ranks.nodes[3]
        addresses = {node["NodeID"]: node["NodeManagerAddress"] for node in ray.nodes()}
        assert [placement["host"] for placement in ranks.placements] == [addresses[node] for node in ranks.nodes]
        await launcher.stop("decode-0")
        await until(lambda: not ranks.left(), "all ranks to end")
    finally:
        await launcher.close()


async def test_instances_started_at_once_are_spread_and_the_router_is_here(tmp_path: Path) -> None:
    config = config_of(**{"decode.tensor_parallel": 2, "prefill.tensor_parallel": 2})
    launcher = RayLauncher(config, tmp_path, 0.0, run="r1", actor_class=StubActor)
    own = ray.get_runtime_context().get_node_id()
    try:
        starts = [start(role, index) for role in ("decode", "prefill") for index in range(2)]
        await asyncio.gather(*(launcher.start(each, REGISTRY) for each in [*starts, start("router", 0)]))
        nodes = [Ranks(launcher, each.instance_id).nodes for each in starts]
        assert all(len(set(of_instance)) == 1 for of_instance in nodes)
        assert set(Counter(node for of_instance in nodes for node in of_instance).values()) == {NODE_CPUS}
        assert Ranks(launcher, "router-0").nodes == [own]
    finally:
        await launcher.close()


async def test_when_one_rank_is_killed_its_instance_is_dead_and_no_other(tmp_path: Path) -> None:
    config = config_of(**{"decode.pipeline_parallel": 2, "prefill.pipeline_parallel": 2})
    launcher = RayLauncher(config, tmp_path, 0.0, run="r1", actor_class=StubActor)
    try:
        await launcher.start(start("decode", 0), REGISTRY)
        await launcher.start(start("prefill", 0), REGISTRY)
        ranks, untouched = Ranks(launcher, "decode-0"), Ranks(launcher, "prefill-0")
        # One on the other node, so that its log is there; where Ray has not given back yet what an earlier test held
        # of a node, both are on one, here or there.
        own = ray.get_runtime_context().get_node_id()
        victim = next((rank for rank, node in enumerate(ranks.nodes) if node != own), 1)
        os.kill(ranks.pids[victim], signal.SIGKILL)
        text = await until_dead(launcher, "decode-0")
        assert text.startswith(f"rank {victim} was lost: its process died")
        assert (f"decode-0-rank{victim}.log" in text) == (ranks.nodes[victim] != own)
        assert f"rank {victim} was lost" in (tmp_path / "decode-0.log").read_text()
        await until(lambda: launcher._launched["decode-0"].ranks[1 - victim].run.done(), "the other to end by itself")
        assert await until_dead(launcher, "decode-0") == text
        await launcher.start(start("decode", 0), REGISTRY)
        again = Ranks(launcher, "decode-0")
        assert again.placements[0]["start_id"] != ranks.placements[0]["start_id"]
        assert Ranks(launcher, "prefill-0").pids == untouched.pids
    finally:
        await launcher.close()


async def test_ranks_that_do_not_end_with_their_instance_are_killed(tmp_path: Path) -> None:
    launcher = RayLauncher(config_of(**{"decode.tensor_parallel": 2}), tmp_path, 0.0, run="r1", actor_class=StubActor)
    try:
        await launcher.start(start("decode", 9), REGISTRY)
        ranks = Ranks(launcher, "decode-9")
        os.kill(ranks.pids[0], signal.SIGKILL)
        await until_dead(launcher, "decode-9")
        deadline_s = time.monotonic() + DEADLINE_S
        while ranks.left():
            assert time.monotonic() < deadline_s
            await launcher.observe()
            await asyncio.sleep(0.1)
    finally:
        await launcher.close()


async def test_without_room_the_error_says_what_was_asked_and_what_there_is(tmp_path: Path) -> None:
    config = config_of(**{"decode.tensor_parallel": NODE_CPUS + 1})
    launcher = RayLauncher(config, tmp_path, 0.0, run="r1", actor_class=StubActor, placement_deadline_s=0.3)
    with pytest.raises(UnavailableError) as caught:
        await launcher.start(start("decode", 0), REGISTRY)
    for part in ("decode-0", "1 x 5 ranks of CPU 1", "each 5 on one node", "CPU 4 free", "0 ranks of this cluster"):
        assert part in str(caught.value)
    assert await launcher.observe() == []


async def test_ranks_that_ray_does_not_start_are_given_up(tmp_path: Path) -> None:
    config = config_of()
    launcher = RayLauncher(config, tmp_path, 0.0, run="r1", actor_class=LateActor, begin_deadline_s=3.0)
    try:
        await launcher.start(start("decode", 0), REGISTRY)
        (seen,) = await launcher.observe()
        assert seen.alive
        text = await until_dead(launcher, "decode-0")
        assert text.startswith("was lost: Ray did not start its process within 3 s")
        await launcher.forget("decode-0")
        assert await launcher.observe() == []
    finally:
        await launcher.close()


async def test_ranks_that_cannot_start_say_why(tmp_path: Path) -> None:
    launcher = RayLauncher(config_of(**{"decode.tensor_parallel": 2}), tmp_path, 0.0, run="r1", actor_class=BrokenActor)
    try:
        await launcher.start(start("decode", 0), REGISTRY)
        text = await until_dead(launcher, "decode-0")
        assert text.startswith("rank ")
        assert "could not start: " in text
        assert "no such module" in text
    finally:
        await launcher.close()


@pytest.mark.parametrize(("num_gpus", "share"), [(0, 0.0), (8, 1.0), (6, 1.0), (4, 0.5), (1, 1 / 6)])
def test_gpus_are_shared_so_that_all_ranks_find_room(tmp_path: Path, num_gpus: int, share: float) -> None:
    config = config_of(**{"decode.tensor_parallel": 4, "prefill.replicas": 2})
    assert RayHost(config, tmp_path)._gpu_share(num_gpus) == pytest.approx(share)


async def test_a_pool_that_listens_on_one_address_stays_on_this_node(tmp_path: Path) -> None:
    config = config_of(**{"decode.host": "127.0.0.1", "decode.pipeline_parallel": 2, "decode.replicas": 3})
    launcher = RayLauncher(config, tmp_path, 0.0, run="r1", actor_class=StubActor)
    try:
        for index in range(2):
            await launcher.start(start("decode", index), REGISTRY)
            assert set(Ranks(launcher, f"decode-{index}").nodes) == {ray.get_runtime_context().get_node_id()}
        launcher._placement._deadline_s = 0.3
        with pytest.raises(UnavailableError, match=r"decode\.host: auto"):
            await launcher.start(start("decode", 2), REGISTRY)
    finally:
        await launcher.close()
