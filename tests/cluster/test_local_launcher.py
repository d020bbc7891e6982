"""Launcher `local` and the controller's shell with real processes: start, restart, stop, and nothing left behind."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from pathlib import Path

import pytest

from baton.cluster.controller import StartInstance
from baton.cluster.controller_service import ControllerService
from baton.cluster.launchers.instance_log import log_name, log_path, log_tail
from baton.cluster.launchers.local import LocalLauncher
from baton.config import ClusterConfig, load_config
from baton.errors import UnavailableError
from baton.proto.baton.v1 import worker_pb2

STUB = Path(__file__).with_name("stub_role.py")
DEADLINE_S = 60.0


def command(mode: str) -> list[str]:
    return [sys.executable, "-P", str(STUB), mode]


def config_of(**overrides: object) -> ClusterConfig:
    return load_config(None, {"name": "told-by-stdin", "stop_grace_s": 5.0, **overrides})


def is_alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


async def until(condition: Callable[[], bool], what: str) -> None:
    deadline_s = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline_s, f"waited {DEADLINE_S:.0f} s for {what}"
        await asyncio.sleep(0.02)


@asynccontextmanager
async def running(config: ClusterConfig, folder: Path, mode: str) -> AsyncIterator[ControllerService]:
    service = ControllerService(config, LocalLauncher(config, folder, command=command(mode)), "local")
    await service.start()
    run = asyncio.create_task(service.run())
    try:
        yield service
    finally:
        service.stop()
        await asyncio.wait_for(run, DEADLINE_S)


def ready(service: ControllerService) -> dict[str, worker_pb2.WorkerStatus]:
    return {
        status.instance_id: status for status in service.registry.instance_list().instances if status.state == "ready"
    }


async def test_a_cluster_starts_restarts_the_dead_and_leaves_nothing(tmp_path: Path) -> None:
    config = config_of()
    async with running(config, tmp_path, "good") as service:
        listed = {status.instance_id for status in service.registry.instance_list().instances}
        await until(lambda: len(ready(service)) == 3, "three instances")
        assert listed <= {"router-0", "prefill-0", "decode-0"}
        first = ready(service)
        assert {status.detail for status in first.values()} == {"told-by-stdin"}
        victim = first["decode-0"].ranks[0].pid
        os.kill(victim, signal.SIGKILL)
        await until(
            lambda: "decode-0" in ready(service) and ready(service)["decode-0"].ranks[0].pid != victim,
            "the next decode-0",
        )
        second = ready(service)
        assert second["decode-0"].incarnation != first["decode-0"].incarnation
        assert second["prefill-0"].incarnation == first["prefill-0"].incarnation
        pids = [status.ranks[0].pid for status in [*first.values(), *second.values()]]
    assert not [pid for pid in pids if is_alive(pid)]
    assert log_tail(tmp_path, "decode-0", 1) == ["stopped well"]


async def test_each_rank_has_a_group_of_its_own_and_all_share_the_session(tmp_path: Path) -> None:
    """Signals of a terminal go to one group only; cores are shared out between sessions first (autogroup)."""
    async with running(config_of(), tmp_path, "good") as service:
        await until(lambda: len(ready(service)) == 3, "three instances")
        pids = [status.ranks[0].pid for status in ready(service).values()]
        assert [os.getpgid(pid) for pid in pids] == pids
        assert {os.getsid(pid) for pid in pids} == {os.getsid(0)}


PARALLEL = {"decode.tensor_parallel": 2, "decode.pipeline_parallel": 2}


async def test_when_one_rank_is_killed_its_instance_is_dead_and_the_others_end(tmp_path: Path) -> None:
    async with running(config_of(**PARALLEL), tmp_path, "good") as service:
        await until(lambda: len(ready(service)) == 3, "three instances")
        first = ready(service)
        pids = [rank.pid for rank in first["decode-0"].ranks]
        assert len(set(pids)) == 4
        told: list[str] = []

        def dead() -> bool:
            listed = service.registry.instance_list().instances
            told.extend(status.detail for status in listed if status.state == "dead")
            return bool(told)

        os.kill(pids[1], signal.SIGKILL)
        await until(dead, "the death of decode-0")
        assert told[0].startswith("rank 1 was killed by SIGKILL")
        await until(lambda: not [pid for pid in pids if is_alive(pid)], "the other ranks")
        await until(lambda: "decode-0" in ready(service), "the next decode-0")
        second = ready(service)
        assert not {rank.pid for rank in second["decode-0"].ranks} & set(pids)
        for untouched in ("prefill-0", "router-0"):
            assert second[untouched].incarnation == first[untouched].incarnation
        every = pids + [rank.pid for status in second.values() for rank in status.ranks]
    assert not [pid for pid in every if is_alive(pid)]
    for rank in range(4):
        assert "stopped well" in log_path(tmp_path, log_name("decode-0", rank, 4)).read_text()
    note = log_path(tmp_path, "decode-0").read_text()
    assert "decode-0 ended: rank 1 was killed by SIGKILL" in note
    assert "decode-0-rank1.log" in note


async def test_one_look_after_the_death_of_a_rank_tells_it(tmp_path: Path) -> None:
    """The controller looks every 0.1 s: no other wait lies between a death and its report."""
    launcher = LocalLauncher(config_of(**PARALLEL), tmp_path, command=["/bin/sh", "-c", "exec sleep 600"])
    await launcher.start(StartInstance("decode-0", "decode", 0), "127.0.0.1:1")
    try:
        ranks = launcher._launched["decode-0"].ranks
        assert (await launcher.observe())[0].alive
        os.kill(ranks[2].process.pid, signal.SIGKILL)
        await asyncio.to_thread(os.waitid, os.P_PID, ranks[2].process.pid, os.WEXITED | os.WNOWAIT)
        (observed,) = await launcher.observe()
        assert (observed.alive, observed.exit_text) == (False, "rank 2 was killed by SIGKILL")
        # The rest got SIGTERM from that look; the cause stays what was seen first.
        await until(lambda: all(rank.process.poll() is not None for rank in ranks), "the other ranks")
        (observed,) = await launcher.observe()
        assert observed.exit_text == "rank 2 was killed by SIGKILL"
    finally:
        await launcher.close()


async def test_ranks_that_do_not_end_with_their_instance_are_killed_before_the_next_start(tmp_path: Path) -> None:
    config = config_of(**PARALLEL, stop_grace_s=0.2)
    async with running(config, tmp_path, "stubborn") as service:
        await until(lambda: "decode-0" in ready(service), "decode-0")
        pids = [rank.pid for rank in ready(service)["decode-0"].ranks]
        os.kill(pids[3], signal.SIGKILL)

        def replaced() -> bool:
            status = ready(service).get("decode-0")
            return status is not None and not {rank.pid for rank in status.ranks} & set(pids)

        await until(replaced, "the next decode-0")
        assert not [pid for pid in pids if is_alive(pid)]


async def test_an_instance_that_cannot_start_is_told_with_its_last_words(tmp_path: Path) -> None:
    async with running(config_of(), tmp_path, "broken") as service:
        dead: dict[str, str] = {}

        def all_dead() -> bool:
            for status in service.registry.instance_list().instances:
                if status.state == "dead":
                    dead[status.instance_id] = status.detail
            return len(dead) == 3

        await until(all_dead, "three failures")
    assert set(dead.values()) == {"ended with code 3: the reason why"}


async def test_of_several_ranks_the_drivers_last_words_are_told(tmp_path: Path) -> None:
    launcher = LocalLauncher(config_of(**PARALLEL), tmp_path, command=command("broken"))
    await launcher.start(StartInstance("decode-0", "decode", 0), "127.0.0.1:1")
    await until(
        lambda: all(rank.process.poll() is not None for rank in launcher._launched["decode-0"].ranks), "four ends"
    )
    (observed,) = await launcher.observe()
    assert observed.exit_text == "rank 2 ended with code 3: the reason why"
    await launcher.forget("decode-0")
    assert await launcher.observe() == []


async def test_who_ignores_sigterm_is_killed_with_its_children(tmp_path: Path) -> None:
    config = config_of(stop_grace_s=0.2)
    async with running(config, tmp_path, "stubborn") as service:
        await until(lambda: len(ready(service)) == 3, "three instances")
        pids = [rank.pid for status in ready(service).values() for rank in status.ranks]
        assert len(pids) == 6
        assert all(is_alive(pid) for pid in pids)
    await until(lambda: not [pid for pid in pids if is_alive(pid)], "all ended")


async def test_a_command_that_does_not_exist(tmp_path: Path) -> None:
    launcher = LocalLauncher(config_of(), tmp_path, command=["/nowhere/baton"])
    with pytest.raises(UnavailableError, match="decode-0"):
        await launcher.start(StartInstance("decode-0", "decode", 0), "127.0.0.1:1")
    await launcher.stop("decode-0")
    assert await launcher.observe() == []


def test_no_instance_outlives_a_killed_parent(tmp_path: Path) -> None:
    """The parent is ended by SIGKILL, so that none of its own code can clean up."""
    parent = f"""
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {str(STUB.parent)!r})
from test_local_launcher import config_of, ready, running, until
async def main():
    async with running(config_of(), Path({str(tmp_path)!r}), "good") as service:
        await until(lambda: len(ready(service)) == 3, "three instances")
        print(*(status.ranks[0].pid for status in ready(service).values()), flush=True)
        await asyncio.sleep(600)
asyncio.run(main())
"""
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pids = [int(pid) for pid in process.stdout.readline().split()]
        assert len(pids) == 3
        process.kill()
    try:
        asyncio.run(until(lambda: not [pid for pid in pids if is_alive(pid)], "all ended"))
    finally:
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    assert "stopped well" in log_path(tmp_path, "prefill-0").read_text()
