"""Launcher `local`: one plain process per rank, in its own process group, its output in its own log file.

    alive --one rank ended--> dead: SIGTERM to the other ranks at once, SIGKILL 1 s later, by whoever calls next
    alive --stop--> SIGTERM to all ranks, SIGKILL when the grace is over

Nothing outlives the parent: each process asks the kernel for a signal on its parent's death (see `role.py`), and
what a rank may have started ends with its group. The configuration travels over stdin, so that no key shows in the
process list.

A group of its own, but no session: Linux shares cores between sessions first (autogroup), and a thread that seldom
runs, such as a router's, waits up to 0.1 s for a core when its session's weight there is small.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baton.clock import MonotonicClock
from baton.cluster.controller import StartInstance
from baton.cluster.controller_service import ControllerService, install_controller_faults
from baton.cluster.gpus import gpu_environment, visible_gpus
from baton.cluster.launchers.base import LaunchedInstance, host_of
from baton.cluster.launchers.instance_log import log_name, log_path, log_tail, note_end
from baton.cluster.launchers.rank_exits import EndKind, RankEnd, cause_of, cause_text
from baton.config import ClusterConfig
from baton.errors import UnavailableError
from baton.placement import Placement

__all__ = ["LocalHost", "LocalLauncher"]

_ROLE_COMMAND = (sys.executable, "-P", "-m", "baton.cluster.role")
_POLL_S = 0.05
_KILL_DEADLINE_S = 5.0
# What the other ranks are given to end by themselves when one has.
_END_S = 1.0
_ADDRESS = "127.0.0.1"


@dataclass(slots=True)
class _Rank:
    rank: int
    process: subprocess.Popen[bytes]
    group_ended: bool = False


@dataclass(slots=True)
class _Launched:
    role: str
    ranks: list[_Rank]
    stopping: bool = False
    # Set once a rank has ended.
    exit_text: str = ""
    kill_at_s: float = 0.0


class LocalLauncher:
    """Launches plain processes; `command` is what runs a role, its arguments are added."""

    def __init__(self, config: ClusterConfig, log_dir: Path, *, command: Sequence[str] = _ROLE_COMMAND) -> None:
        self._config = config
        self._config_json = config.model_dump_json().encode()
        self._log_dir = log_dir
        self._command = tuple(command)
        self._gpus = visible_gpus(os.environ)
        self._clock = MonotonicClock()
        self._launched: dict[str, _Launched] = {}

    @property
    def outlives_controller(self) -> bool:
        """See `Launcher.outlives_controller`."""
        return False

    async def adopt(self) -> list[str]:
        """See `Launcher.adopt`: nothing outlives the controller."""
        return []

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher.start`. Call it on the thread that lives as long as the cluster.

        The kernel's parent-death signal follows the thread that forks, so no executor thread may do this.
        """
        await self.forget(instance.instance_id)
        launched = self._launched[instance.instance_id] = _Launched(instance.role, [])
        start_id = secrets.token_hex(8)
        num_ranks = self._config.num_ranks_of(instance.role)
        try:
            for rank in range(num_ranks):
                placement = Placement(
                    instance_id=instance.instance_id,
                    start_id=start_id,
                    rank=rank,
                    num_ranks=num_ranks,
                    host=host_of(self._config, instance.role, _ADDRESS),
                )
                launched.ranks.append(_Rank(rank, self._spawn(instance.role, placement, registry_address)))
        except OSError as error:
            await self.forget(instance.instance_id)
            raise UnavailableError(f"cannot start {instance.instance_id}: {error}") from error
        for started in launched.ranks:
            assert started.process.stdin is not None
            # A child that died at once closes the pipe; `observe` tells how it ended.
            with suppress(BrokenPipeError), started.process.stdin as pipe:
                pipe.write(self._config_json)

    async def stop(self, instance_id: str) -> None:
        """SIGTERM to every rank's group, then SIGKILL after the grace."""
        launched = self._launched.get(instance_id)
        if launched is None:
            return
        launched.stopping = True
        for rank in launched.ranks:
            if rank.process.poll() is None:
                _signal_group(rank, signal.SIGTERM)
        await self._ended(launched, self._config.stop_grace_s)
        await self._kill(instance_id, launched)

    async def forget(self, instance_id: str) -> None:
        """See `Launcher.forget`. Ranks that still end because another one has are given their moment, then killed."""
        launched = self._launched.get(instance_id)
        if launched is None:
            return
        await self._ended(launched, launched.kill_at_s - self._clock.now_s())
        await self._kill(instance_id, launched)
        self._launched.pop(instance_id, None)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher.observe`. Where one rank has ended, the others are made to."""
        for instance_id, launched in self._launched.items():
            if not launched.exit_text:
                self._look(instance_id, launched)
            elif not launched.stopping and self._clock.now_s() >= launched.kill_at_s:
                for rank in launched.ranks:
                    _end_group(rank)
        return [
            LaunchedInstance(instance_id, launched.role, not launched.exit_text, launched.exit_text)
            for instance_id, launched in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher.close`."""
        for launched in self._launched.values():
            for rank in launched.ranks:
                _end_group(rank)
        for launched in self._launched.values():
            await self._ended(launched, _KILL_DEADLINE_S)

    def _look(self, instance_id: str, launched: _Launched) -> None:
        """Note the first rank that has ended; the others get SIGTERM at once and SIGKILL a moment later."""
        ends = [_end_of(rank) for rank in launched.ranks if rank.process.poll() is not None]
        if not ends:
            return
        num_ranks = len(launched.ranks)
        cause = cause_of(ends, driver_rank=self._config.driver_rank_of(launched.role))
        last = log_tail(self._log_dir, log_name(instance_id, cause.rank, num_ranks), 1)
        launched.exit_text = cause_text(cause, num_ranks=num_ranks) + (f": {last[0]}" if last else "")
        launched.kill_at_s = self._clock.now_s() + _END_S
        if launched.stopping:
            return
        for rank in launched.ranks:
            if rank.process.returncode is None:
                _signal_group(rank, signal.SIGTERM)
            else:
                _end_group(rank)
        note_end(self._log_dir, instance_id, cause.rank, num_ranks, cause_text(cause, num_ranks=num_ranks))

    def _spawn(self, role: str, placement: Placement, registry_address: str) -> subprocess.Popen[bytes]:
        arguments = {
            "role": role,
            "instance-id": placement.instance_id,
            "start-id": placement.start_id,
            "rank": placement.rank,
            "num-ranks": placement.num_ranks,
            "host": placement.host,
            "registry": registry_address,
        }
        name = log_name(placement.instance_id, placement.rank, placement.num_ranks)
        gpus = gpu_environment(self._config, role, placement.index, placement.rank, self._gpus)
        with log_path(self._log_dir, name).open("ab") as log:
            return subprocess.Popen(
                [*self._command, *(part for key, value in arguments.items() for part in (f"--{key}", str(value)))],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                process_group=0,
                env={**os.environ, **gpus, "BATON_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            )

    async def _kill(self, instance_id: str, launched: _Launched) -> None:
        for rank in launched.ranks:
            _end_group(rank)
        if not await self._ended(launched, _KILL_DEADLINE_S):
            pids = [str(rank.process.pid) for rank in launched.ranks if rank.process.returncode is None]
            raise UnavailableError(f"{instance_id} (pid {', '.join(pids)}) does not end even when killed")

    async def _ended(self, launched: _Launched, deadline_s: float) -> bool:
        """Whether all ranks have ended within `deadline_s`."""
        until_s = self._clock.now_s() + deadline_s
        while any(rank.process.poll() is None for rank in launched.ranks):
            if self._clock.now_s() >= until_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True


class LocalHost:
    """See `Host`: the controller runs in this very process."""

    def __init__(self, config: ClusterConfig, log_dir: Path) -> None:
        install_controller_faults(config)
        self._service = ControllerService(config, LocalLauncher(config, log_dir), "local")
        self._run: asyncio.Task[None] | None = None

    async def start(self) -> str:
        """See `Host.start`."""
        address = await self._service.start()
        self._run = asyncio.create_task(self._service.run())
        return address

    async def wait(self) -> None:
        """See `Host.wait`."""
        assert self._run is not None
        await asyncio.shield(self._run)

    async def stop(self) -> None:
        """See `Host.stop`."""
        self._service.stop()
        if self._run is not None:
            await self._run


def _end_of(rank: _Rank) -> RankEnd:
    code = rank.process.returncode
    if code < 0:
        return RankEnd(rank.rank, EndKind.KILLED, f"was killed by {signal.Signals(-code).name}")
    return RankEnd(rank.rank, EndKind.FAILED if code else EndKind.STOPPED, f"ended with code {code}")


def _end_group(rank: _Rank) -> None:
    """Kill a rank and what it may have started; once it is over, its number may be another group's."""
    if not rank.group_ended:
        _signal_group(rank, signal.SIGKILL)
    rank.group_ended = True


def _signal_group(rank: _Rank, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(rank.process.pid, number)
