"""The two actors of launcher `ray`. Imported in Ray's worker processes, so free of torch until a role is prepared.

    ControllerActor   detached, one per cluster: registry and reconcile loop, in a thread with its own event loop
    RankActor         one per rank, on any node: `run` serves the role until `stop`, in its own thread and event loop

No method is `async`: one alone would make Ray run all of them in a single event loop that `run` would block.
Each actor writes its output to the same log file that launcher `local` would use, on the node where it runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
from pathlib import Path
from typing import Any

from baton.cluster import role as role_module
from baton.cluster.controller_service import ControllerService, install_controller_faults
from baton.cluster.event_loop import run_event_loop
from baton.cluster.launchers.instance_log import log_name, log_path
from baton.config import ClusterConfig, config_from_json
from baton.config_values import AUTO_HOST
from baton.errors import BatonError, DeadlineError
from baton.log import setup_logging
from baton.placement import Placement

__all__ = ["ControllerActor", "RankActor"]

logger = logging.getLogger(__name__)

_START_DEADLINE_S = 30.0


class RankActor:
    """One rank of one instance. Made an actor by `launchers/ray.py`."""

    def __init__(
        self, config_json: str, role: str, placement: dict[str, Any], registry_address: str, log_dir: str
    ) -> None:
        self.config = config_from_json(config_json)
        self.role = role
        self.placement = Placement(**placement)
        self.registry_address = registry_address
        _write_output_to(
            log_path(Path(log_dir), log_name(self.placement.instance_id, self.placement.rank, self.placement.num_ranks))
        )
        role_module.prepare(self.config, role, self.placement)
        self.started = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stop_event: asyncio.Event | None = None

    def run(self) -> str:
        """Serve until `stop`; returns "" or why the role could not go on."""
        try:
            run_event_loop(_serve_rank(self))
        except BatonError as error:
            print(error, file=sys.stderr, flush=True)
            return str(error)
        except Exception:
            logger.exception("%s failed", self.placement.name)
            raise
        return ""

    def stop(self) -> None:
        """Make `run` return."""
        if not self.started.wait(_START_DEADLINE_S):
            raise DeadlineError(f"{self.placement.name} did not start to serve within {_START_DEADLINE_S:.0f} s")
        assert self.loop is not None
        assert self.stop_event is not None
        self.loop.call_soon_threadsafe(self.stop_event.set)


class ControllerActor:
    """The controller of one cluster. Made a named, detached actor by `launchers/ray.py`."""

    def __init__(self, config_json: str, log_dir: str, num_gpus_per_rank: float) -> None:
        self.config = config_from_json(config_json)
        self.log_dir = Path(log_dir)
        self.num_gpus_per_rank = num_gpus_per_rank
        _write_output_to(log_path(self.log_dir, "controller"))
        setup_logging(level=self.config.log.level, format=self.config.log.format, instance_id="controller")
        install_controller_faults(self.config)
        self.started = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.service: ControllerService | None = None

    def run(self) -> None:
        """Keep the cluster as desired until it is stopped."""
        asyncio.run(_run_controller(self))

    def address(self) -> str:
        """host:port of the registry."""
        return self._wait_started().registry.address

    def stop(self) -> None:
        """Make `run` end every instance and return."""
        service = self._wait_started()
        assert self.loop is not None
        self.loop.call_soon_threadsafe(service.stop)

    def _wait_started(self) -> ControllerService:
        if not self.started.wait(_START_DEADLINE_S):
            raise DeadlineError(f"the controller did not start within {_START_DEADLINE_S:.0f} s")
        assert self.service is not None
        return self.service


async def _serve_rank(actor: RankActor) -> None:
    actor.loop, actor.stop_event = asyncio.get_running_loop(), asyncio.Event()
    actor.started.set()
    await role_module.serve_role(actor.config, actor.role, actor.placement, actor.registry_address, actor.stop_event)


async def _run_controller(actor: ControllerActor) -> None:
    from baton.cluster.launchers.ray_launcher import RayLauncher

    launcher = RayLauncher(actor.config, actor.log_dir, actor.num_gpus_per_rank)
    actor.loop = asyncio.get_running_loop()
    actor.service = ControllerService(actor.config, launcher, "ray")
    await actor.service.start(_registry_host(actor.config))
    actor.started.set()
    await actor.service.run()


def _registry_host(config: ClusterConfig) -> str:
    """Loopback, unless ranks may run on other nodes."""
    if AUTO_HOST not in (config.prefill.host, config.decode.host):
        return "127.0.0.1"
    from ray.util import get_node_ip_address

    address: str = get_node_ip_address()  # type: ignore[no-untyped-call]
    return address


def _write_output_to(path: Path) -> None:
    """Send this process's standard output and error, native code's included, to `path`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
