"""The two actors of launcher `ray`. Imported in Ray's worker processes, so free of torch until a role is prepared.

    ControllerActor   detached, one per cluster: registry and reconcile loop, in a thread with its own event loop
    RankActor         one per rank: `run` serves the role until `stop`, in its own thread and event loop

Each writes its output to the same log file that launcher `local` would use.
"""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

from baton.cluster import role as role_module
from baton.cluster.controller_service import ControllerService
from baton.cluster.launchers.base import log_path
from baton.config import config_from_json
from baton.errors import BatonError, DeadlineError
from baton.log import setup_logging

__all__ = ["ControllerActor", "RankActor"]

_START_DEADLINE_S = 30.0


class RankActor:
    """One rank of one instance. Made an actor by `launchers/ray.py`."""

    def __init__(self, config_json: str, role: str, instance_id: str, registry_address: str, log_dir: str) -> None:
        self._config = config_from_json(config_json)
        self._role = role
        self._instance_id = instance_id
        self._registry_address = registry_address
        _write_output_to(log_path(Path(log_dir), instance_id))
        role_module.prepare(self._config, instance_id)
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._stop: asyncio.Event | None = None

    def run(self) -> str:
        """Serve until `stop`; returns "" or why the role could not go on."""
        try:
            asyncio.run(self._serve())
        except BatonError as error:
            return str(error)
        return ""

    def stop(self) -> None:
        """Make `run` return."""
        if not self._started.wait(_START_DEADLINE_S):
            raise DeadlineError(f"{self._instance_id} did not start to serve within {_START_DEADLINE_S:.0f} s")
        assert self._loop is not None
        assert self._stop is not None
        self._loop.call_soon_threadsafe(self._stop.set)

    async def _serve(self) -> None:
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        self._started.set()
        await role_module.serve_role(self._config, self._role, self._instance_id, self._registry_address, self._stop)


class ControllerActor:
    """The controller of one cluster. Made a named, detached actor by `launchers/ray.py`."""

    def __init__(self, config_json: str, log_dir: str, num_gpus_per_rank: float) -> None:
        self._config = config_from_json(config_json)
        self._log_dir = Path(log_dir)
        self._num_gpus_per_rank = num_gpus_per_rank
        _write_output_to(log_path(self._log_dir, "controller"))
        setup_logging(level=self._config.log.level, format=self._config.log.format, instance_id="controller")
        self._started = threading.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._service: ControllerService | None = None

    def run(self) -> None:
        """Keep the cluster as desired until it is stopped."""
        asyncio.run(self._run())

    def address(self) -> str:
        """host:port of the registry."""
        assert self._wait_started().registry.address
        return self._wait_started().registry.address

    def stop(self) -> None:
        """Make `run` end every instance and return."""
        service = self._wait_started()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(service.stop)

    def _wait_started(self) -> ControllerService:
        if not self._started.wait(_START_DEADLINE_S):
            raise DeadlineError(f"the controller did not start within {_START_DEADLINE_S:.0f} s")
        assert self._service is not None
        return self._service

    async def _run(self) -> None:
        from baton.cluster.launchers.ray import RayLauncher

        launcher = RayLauncher(self._config, self._log_dir, self._num_gpus_per_rank)
        self._loop = asyncio.get_running_loop()
        self._service = ControllerService(self._config, launcher, "ray")
        await self._service.start()
        self._started.set()
        await self._service.run()


def _write_output_to(path: Path) -> None:
    """Send this process's standard output and error, native code's included, to `path`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
