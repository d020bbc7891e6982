"""Launcher `ray` under a controller that dies: what it made lives on, and the next launcher takes it over or ends it.

A launcher is left behind at every one of its writes to Ray, as a killed controller leaves its work; another one begins.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.util
from ray.util.placement_group import placement_group_table
from stub_actor import StubActor

import baton
from baton.cluster.controller import StartInstance
from baton.cluster.launchers import ray_instance, ray_launcher, ray_placement
from baton.cluster.launchers.base import SupersededError
from baton.cluster.launchers.ray_launcher import RayLauncher
from baton.cluster.launchers.ray_leftovers import end_all
from baton.config import load_config

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(240)]

DEADLINE_S = 60.0
REGISTRY = "127.0.0.1:1"
DECODE, ROUTER = StartInstance("decode-0", "decode", 0), StartInstance("router-0", "router", 0)
CONFIG = load_config(None, {"decode.pipeline_parallel": 2, "ray.cpus_per_rank": 0.1, "stop_grace_s": 2.0})
NUM_RANKS = NUM_GROUPS = 2


@pytest.fixture(scope="module", autouse=True)
def _ray() -> Iterator[None]:
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
        try:
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=80 << 20,
                namespace="baton",
                log_to_driver=False,
                configure_logging=False,
            )
            yield
        finally:
            ray.shutdown()


@pytest.fixture(autouse=True)
def _nothing_left() -> Iterator[None]:
    yield
    end_all(CONFIG.name, deadline_s=DEADLINE_S)
    assert names() == []


def names() -> list[str]:
    """Of every actor and group of the cluster that Ray knows."""
    groups = [table["name"] for table in placement_group_table().values() if table["state"] != "REMOVED"]
    return sorted(name for name in [*ray.util.list_named_actors(), *groups] if name.startswith(f"{CONFIG.name}/"))


def launcher_of(folder: Path, run: str = "r1", generation: int = 1) -> RayLauncher:
    return RayLauncher(CONFIG, folder, 0.0, run=run, generation=generation, actor_class=StubActor)


def told(launcher: RayLauncher, instance_id: str) -> tuple[list[int], set[str]]:
    """Pids of the ranks, and their start ids."""
    actors = [rank.actor for rank in launcher._launched[instance_id].ranks]
    answers = ray.get([actor.where.remote() for actor in actors], timeout=DEADLINE_S)
    return [pid for pid, _, _ in answers], {placement["start_id"] for _, _, placement in answers}


async def alive(launcher: RayLauncher) -> dict[str, bool]:
    return {instance.instance_id: instance.alive for instance in await launcher.observe()}


async def until_dead(launcher: RayLauncher, instance_id: str) -> None:
    until_s = time.monotonic() + DEADLINE_S
    while (await alive(launcher))[instance_id]:
        assert time.monotonic() < until_s
        await asyncio.sleep(0.05)


async def observe_for_ever(launcher: RayLauncher) -> None:
    async with asyncio.timeout(DEADLINE_S):
        while True:
            await launcher.observe()
            await asyncio.sleep(0.02)


class LeftError(Exception):
    """The controller died here."""


class Writes:
    """Lets the launcher's writes to Ray through until one, at which it is left as it is.

    Attributes:
        count: writes so far.
        left_at: the write that does not happen, and nothing after it.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.count = 0
        self.left_at: int | None = None
        for module, name in (
            (ray_placement, "placement_group"),
            (ray_launcher, "Rank"),
            (ray_launcher, "destroy"),
            (ray_launcher, "end_named"),
            (ray_instance, "remove_placement_group"),
        ):
            patch.setattr(module, name, self._guarded(getattr(module, name)))

    def _guarded(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*arguments: Any, **options: Any) -> Any:
            if self.left_at is not None and self.count >= self.left_at:
                raise LeftError
            self.count += 1
            return call(*arguments, **options)

        return guarded


async def test_what_runs_is_taken_over_and_watched(tmp_path: Path) -> None:
    first, second = launcher_of(tmp_path), launcher_of(tmp_path, generation=2)
    assert await first.adopt() == []
    await asyncio.gather(first.start(DECODE, REGISTRY), first.start(ROUTER, REGISTRY))
    pids, starts = told(first, "decode-0")
    assert await second.adopt() == ["decode-0", "router-0"]
    assert told(second, "decode-0") == (pids, starts)
    assert await alive(second) == {"decode-0": True, "router-0": True}
    # The one before is told that its time is over, and touches nothing.
    with pytest.raises(SupersededError):
        await observe_for_ever(first)
    os.kill(pids[1], signal.SIGKILL)
    await until_dead(second, "decode-0")
    assert "rank 1 was lost" in next(each.exit_text for each in await second.observe() if each.role == "decode")
    await second.start(DECODE, REGISTRY)
    again, starts_again = told(second, "decode-0")
    assert len(starts_again) == 1
    assert not starts & starts_again
    assert not set(pids) & set(again)
    await second.stop("router-0")
    await second.close()
    assert names() == []


async def test_who_died_while_no_controller_was_there_is_not_taken_over(tmp_path: Path) -> None:
    first, second = launcher_of(tmp_path), launcher_of(tmp_path, generation=2)
    await first.start(DECODE, REGISTRY)
    os.kill(told(first, "decode-0")[0][0], signal.SIGKILL)
    await until_dead(first, "decode-0")
    assert await second.adopt() == []
    assert names() == []


async def test_what_another_run_left_is_ended(tmp_path: Path) -> None:
    first, second = launcher_of(tmp_path, run="r0"), launcher_of(tmp_path, run="r1")
    await first.start(ROUTER, REGISTRY)
    assert await second.adopt() == []
    assert names() == []


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
async def test_left_at_every_write_of_a_start_no_rank_runs_twice(tmp_path: Path) -> None:
    with pytest.MonkeyPatch.context() as patch:
        writes = Writes(patch)
        launcher = launcher_of(tmp_path)
        await launcher.start(DECODE, REGISTRY)
        num_writes = writes.count
        await launcher.close()
    assert num_writes >= 1 + NUM_GROUPS + NUM_RANKS
    for left_at in range(num_writes):
        with pytest.MonkeyPatch.context() as patch:
            writes = Writes(patch)
            writes.left_at = left_at
            with pytest.raises(LeftError):
                await launcher_of(tmp_path).start(DECODE, REGISTRY)
        successor = launcher_of(tmp_path, generation=2)
        adopted = await successor.adopt()
        # The last write is a watch: all that Ray needs was there before it.
        assert adopted == (["decode-0"] if left_at == num_writes - 1 else []), (left_at, names())
        if not adopted:
            await successor.start(DECODE, REGISTRY)
        pids, starts = told(successor, "decode-0")
        assert len(set(pids)) == NUM_RANKS
        assert len(starts) == 1
        assert await alive(successor) == {"decode-0": True}
        assert len(names()) == NUM_RANKS + NUM_GROUPS
        await successor.close()
