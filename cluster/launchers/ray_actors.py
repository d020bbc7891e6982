"""The two actors of launcher `ray`. Imported in Ray's worker processes, so free of torch until a role is prepared.

    ControllerActor   detached, one per cluster: registry and reconcile loop, in a thread with its own event loop. When
                      its process dies Ray starts another one, which serves the registry where it was and adopts the
                      ranks that run.
    RankActor         detached, one per rank, on any node: serves its role from its creation until `stop`, in its own
                      thread and event loop, whatever becomes of the controller

No method is `async`: one alone would make Ray run all of them in a single event loop that a blocking one would hold up.
Each actor writes its output to the same log file that launcher `local` would use, on the node where it runs.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any

import ray

from baton.cluster import role as role_module
from baton.cluster.controller_notes import ControllerNotes
from baton.cluster.controller_service import ControllerService, install_controller_faults
from baton.cluster.event_loop import run_event_loop
from baton.cluster.launchers.instance_log import log_name, log_path
from baton.cluster.launchers.watch_point import WatchPoint
from baton.config import config_from_json, split_host_port
from baton.errors import BatonError, DeadlineError, UnavailableError
from baton.log import setup_logging
from baton.placement import Placement

__all__ = ["ControllerActor", "RankActor"]

logger = logging.getLogger(__name__)

_START_DEADLINE_S = 30.0
_ADDRESS_PAUSE_S = 1.0
_FAILED_PAUSE_S = 1.0
# How long the controller of a stopped cluster stays to be asked whether it has ended.
_LINGER_S = 5.0


class RankActor:
    """One rank of one instance. Made an actor by `launchers/ray_launcher.py`."""

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
        self.loop: asyncio.AbstractEventLoop | None = None
        self.stop_event: asyncio.Event | None = None
        self.watch_point = WatchPoint()
        self.started = threading.Event()
        threading.Thread(target=self._serve, name=self.placement.name, daemon=True).start()

    def watch(self, generation: int) -> tuple[bool, str]:
        """See `WatchPoint.watch`."""
        return self.watch_point.watch(generation)

    def stop(self) -> None:
        """Make the role end."""
        if not self.started.wait(_START_DEADLINE_S):
            raise DeadlineError(f"{self.placement.name} did not start to serve within {_START_DEADLINE_S:.0f} s")
        assert self.loop is not None
        assert self.stop_event is not None
        self.loop.call_soon_threadsafe(self.stop_event.set)

    def _serve(self) -> None:
        text = ""
        try:
            run_event_loop(_serve_rank(self))
        except BatonError as error:
            print(error, file=sys.stderr, flush=True)
            text = str(error)
        except BaseException as error:
            logger.exception("%s failed", self.placement.name)
            text = f"{type(error).__name__}: {error}"
        self.watch_point.end(text)


class ControllerActor:
    """The controller of one cluster. Made a named, detached actor by `launchers/ray.py`.

    Args:
        run: of this `baton up`, the same for all its controllers.
        registry_address: where each of them serves the registry.
    """

    def __init__(
        self, config_json: str, log_dir: str, num_gpus_per_rank: float, run: str, registry_address: str
    ) -> None:
        self.config = config_from_json(config_json)
        self.log_dir = Path(log_dir)
        self.num_gpus_per_rank = num_gpus_per_rank
        self.run = run
        self.registry_address = registry_address
        _write_output_to(log_path(self.log_dir, "controller"))
        setup_logging(level=self.config.log.level, format=self.config.log.format, instance_id="controller")
        install_controller_faults(self.config)
        self.problem = ""
        self.serving = threading.Event()
        self.ended = threading.Event()
        self.loop: asyncio.AbstractEventLoop | None = None
        self.service: ControllerService | None = None
        threading.Thread(target=self._control, name="controller", daemon=True).start()

    def wait_serving(self, deadline_s: float) -> str:
        """Wait for the registry; returns why it is not served yet, or the empty string."""
        return "" if self.serving.wait(deadline_s) else self.problem or "it is still starting"

    def wait_ended(self) -> None:
        """Return when the cluster has been stopped."""
        # As long as the cluster lives; who asks notices when this process does not.
        self.ended.wait()

    def stop(self) -> None:
        """End every instance, then the controller."""
        if not self.serving.wait(_START_DEADLINE_S):
            raise DeadlineError(f"the controller did not start within {_START_DEADLINE_S:.0f} s: {self.problem}")
        assert self.service is not None
        assert self.loop is not None
        self.loop.call_soon_threadsafe(self.service.stop)

    def _control(self) -> None:
        try:
            asyncio.run(_run_controller(self))
        except BaseException:
            logger.exception("the controller failed; Ray starts another one, which takes over what runs")
            time.sleep(_FAILED_PAUSE_S)
            os._exit(1)
        self.ended.set()
        time.sleep(_LINGER_S)
        # For those whose `baton up` is gone: ended for good, not to be started again.
        ray.kill(ray.get_runtime_context().current_actor)


async def _serve_rank(actor: RankActor) -> None:
    actor.loop, actor.stop_event = asyncio.get_running_loop(), asyncio.Event()
    actor.started.set()
    await role_module.serve_role(actor.config, actor.role, actor.placement, actor.registry_address, actor.stop_event)


async def _run_controller(actor: ControllerActor) -> None:
    from baton.cluster.launchers.ray_launcher import RayLauncher

    notes = ControllerNotes(actor.log_dir / "controller.json", actor.run)
    launcher = RayLauncher(
        actor.config, actor.log_dir, actor.num_gpus_per_rank, run=actor.run, generation=notes.generation
    )
    actor.loop = asyncio.get_running_loop()
    actor.service = ControllerService(actor.config, launcher, "ray", notes=notes)
    host, port = split_host_port(actor.registry_address)
    while True:
        try:
            await actor.service.start(host, port)
            break
        except UnavailableError as error:
            # Everybody knows this address and no other: there is nothing to do but to wait for it.
            if str(error) != actor.problem:
                logger.error("%s; it is tried again until it is free", error)
            actor.problem = str(error)
            await asyncio.sleep(_ADDRESS_PAUSE_S)
    actor.serving.set()
    await actor.service.run()


def _write_output_to(path: Path) -> None:
    """Send this process's standard output and error, native code's included, to `path`."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
