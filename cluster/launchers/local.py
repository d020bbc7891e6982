"""Launcher `local`: one plain process per instance, in its own process group, its output in its own log file.

Nothing outlives the parent: each process asks the kernel for a signal on its parent's death (see `role.py`), and
`stop` kills the whole group when the grace is over. The configuration travels over stdin, so that no key shows in
the process list.
"""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from baton.clock import MonotonicClock
from baton.cluster.controller import StartInstance
from baton.cluster.controller_service import ControllerService
from baton.cluster.launchers.base import LaunchedInstance, log_path, log_tail
from baton.config import ClusterConfig
from baton.errors import UnavailableError

__all__ = ["LocalHost", "LocalLauncher"]

_ROLE_COMMAND = (sys.executable, "-P", "-m", "baton.cluster.role")
_POLL_S = 0.05
_KILL_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Launched:
    role: str
    process: subprocess.Popen[bytes]


class LocalLauncher:
    """Launches plain processes; `command` is what runs a role, its arguments are added."""

    def __init__(self, config: ClusterConfig, log_dir: Path, *, command: Sequence[str] = _ROLE_COMMAND) -> None:
        self._config_json = config.model_dump_json().encode()
        self._grace_s = config.stop_grace_s
        self._log_dir = log_dir
        self._command = tuple(command)
        self._clock = MonotonicClock()
        self._launched: dict[str, _Launched] = {}

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher.start`. Call it on the thread that lives as long as the cluster.

        The kernel's parent-death signal follows the thread that forks, so no executor thread may do this.
        """
        try:
            process = self._spawn(instance, registry_address)
        except OSError as error:
            raise UnavailableError(f"cannot start {instance.instance_id}: {error}") from error
        self._launched[instance.instance_id] = _Launched(instance.role, process)
        assert process.stdin is not None
        # A child that died at once closes the pipe; `observe` tells how it ended.
        with suppress(BrokenPipeError), process.stdin as pipe:
            pipe.write(self._config_json)

    async def stop(self, instance_id: str) -> None:
        """SIGTERM to the group, then SIGKILL after the grace."""
        launched = self._launched.get(instance_id)
        if launched is None:
            return
        _signal_group(launched.process, signal.SIGTERM)
        if not await self._ended(launched.process, self._grace_s):
            _signal_group(launched.process, signal.SIGKILL)
            if not await self._ended(launched.process, _KILL_DEADLINE_S):
                raise UnavailableError(f"{instance_id} (pid {launched.process.pid}) does not end even when killed")
        # What the instance itself may have started is in its group.
        _signal_group(launched.process, signal.SIGKILL)

    async def forget(self, instance_id: str) -> None:
        """See `Launcher.forget`."""
        self._launched.pop(instance_id, None)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher.observe`."""
        return [
            LaunchedInstance(instance_id, launched.role, launched.process.poll() is None, self._exit_text(instance_id))
            for instance_id, launched in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher.close`."""
        for launched in self._launched.values():
            _signal_group(launched.process, signal.SIGKILL)
        for launched in self._launched.values():
            await self._ended(launched.process, _KILL_DEADLINE_S)

    def _spawn(self, instance: StartInstance, registry_address: str) -> subprocess.Popen[bytes]:
        with log_path(self._log_dir, instance.instance_id).open("ab") as log:
            return subprocess.Popen(
                [
                    *self._command,
                    *("--role", instance.role, "--instance-id", instance.instance_id, "--registry", registry_address),
                ],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "BATON_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
            )

    async def _ended(self, process: subprocess.Popen[bytes], deadline_s: float) -> bool:
        until_s = self._clock.now_s() + deadline_s
        while process.poll() is None:
            if self._clock.now_s() >= until_s:
                return False
            await asyncio.sleep(_POLL_S)
        return True

    def _exit_text(self, instance_id: str) -> str:
        code = self._launched[instance_id].process.returncode
        if code is None:
            return ""
        how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        last = log_tail(self._log_dir, instance_id, 1)
        return f"{how}: {last[0]}" if last else how


class LocalHost:
    """See `Host`: the controller runs in this very process."""

    def __init__(self, config: ClusterConfig, log_dir: Path) -> None:
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


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
