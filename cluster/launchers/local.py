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
from baton.cluster.launchers.base import LaunchedInstance, log_path, log_tail
from baton.config import ClusterConfig
from baton.errors import UnavailableError

__all__ = ["LocalLauncher"]

_ROLE_COMMAND = (sys.executable, "-P", "-m", "baton.cluster.role")
_POLL_S = 0.05
_KILL_DEADLINE_S = 5.0


@dataclass(frozen=True, slots=True)
class _Launched:
    role: str
    process: subprocess.Popen[bytes]


class LocalLauncher:
    """Args: `command` is what runs a role; its arguments are added."""

    def __init__(self, config: ClusterConfig, log_dir: Path, *, command: Sequence[str] = _ROLE_COMMAND) -> None:
        self._config_json = config.model_dump_json().encode()
        self._grace_s = config.stop_grace_s
        self._log_dir = log_dir
        self._command = tuple(command)
        self._clock = MonotonicClock()
        self._launched: dict[str, _Launched] = {}

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher.start`. Must run on the thread that lives as long as the cluster."""
        arguments = [
            *self._command,
            *("--role", instance.role, "--instance-id", instance.instance_id, "--registry", registry_address),
        ]
        # The kernel's parent-death signal follows the thread that forks, so no executor thread may do this.
        try:
            with log_path(self._log_dir, instance.instance_id).open("ab") as log:
                process = subprocess.Popen(
                    arguments,
                    stdin=subprocess.PIPE,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    env={**os.environ, "BATON_PARENT_PID": str(os.getpid()), "PYTHONUNBUFFERED": "1"},
                )
        except OSError as error:
            raise UnavailableError(f"cannot start {instance.instance_id}: {error}") from error
        self._launched[instance.instance_id] = _Launched(instance.role, process)
        assert process.stdin is not None
        # A child that died at once closes the pipe; `observe` tells how it ended.
        with suppress(BrokenPipeError):
            process.stdin.write(self._config_json)
            process.stdin.close()

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

    async def _ended(self, process: subprocess.Popen[bytes], deadline_s: float) -> bool:
        until_s = self._clock.now_s() + deadline_s
        while process.poll() is None and self._clock.now_s() < until_s:
            await asyncio.sleep(_POLL_S)
        return process.returncode is not None

    def _exit_text(self, instance_id: str) -> str:
        code = self._launched[instance_id].process.returncode
        if code is None:
            return ""
        how = f"ended with code {code}" if code >= 0 else f"was killed by {signal.Signals(-code).name}"
        last = log_tail(self._log_dir, instance_id, 1)
        return f"{how}: {last[0]}" if last else how


def _signal_group(process: subprocess.Popen[bytes], number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.killpg(process.pid, number)
