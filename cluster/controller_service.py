"""The controller's shell: serves the registry, asks the pure controller what to do, and has the launcher do it.

The same for both launchers; `local` runs it inside `baton up`, `ray` inside a detached actor.

    start() -> registry address, what runs is adopted      run() until StopCluster or stop(), then end every instance

A controller may die at any moment and another one begin: what it decides follows from what is desired and what is
observed, and what was asked of it and cannot be observed is in its notes. Where instances outlive the controller, one
that fails leaves them alone.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from baton import faults
from baton.clock import Clock, MonotonicClock
from baton.cluster.controller import Action, Controller, ObservedInstance, StartInstance, StopInstance
from baton.cluster.controller_notes import ControllerNotes
from baton.cluster.launchers.base import LaunchedInstance, Launcher, SupersededError
from baton.cluster.launchers.instance_log import log_name, log_path
from baton.cluster.registry import RegistryServer
from baton.config import ClusterConfig
from baton.errors import BatonError
from baton.proto.baton.v1 import worker_pb2

__all__ = ["ControllerService", "desired_instances", "empty_logs", "install_controller_faults"]

logger = logging.getLogger(__name__)

_PERIOD_S = 0.1
# Beyond an instance's own grace: the launcher's kill and its wait.
_STOP_SLACK_S = 10.0
# Past the lease, an instance whose process is there and says nothing is stuck: it is stopped and started anew.
_STUCK_S = 20.0
# One that was adopted may still be starting, and is given more time until its first word.
_ADOPTED_STUCK_S = 60.0


def desired_replicas(config: ClusterConfig) -> dict[str, int]:
    """Instances per role. Routers come first: they are up while models still load."""
    return {
        "router": config.router.replicas,
        "prefill": config.prefill.replicas,
        "decode": config.decode.replicas,
    }


def desired_instances(config: ClusterConfig) -> dict[str, StartInstance]:
    """All instances of a cluster that is as configured, by id."""
    return Controller(desired_replicas(config)).desired


def empty_logs(config: ClusterConfig, log_dir: Path) -> None:
    """Start every log anew, readable by this user only."""
    log_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
    for old in log_dir.glob("*-rank*.log"):
        old.unlink()
    names = {"controller", *(desired := desired_instances(config))}
    for instance_id, start in desired.items():
        num_ranks = config.num_ranks_of(start.role)
        names |= {log_name(instance_id, rank, num_ranks) for rank in range(num_ranks)}
    for name in names:
        log_path(log_dir, name).write_bytes(b"")


def install_controller_faults(config: ClusterConfig) -> None:
    """Makes the rules about the controller those of this process."""
    if config.faults.rules:
        faults.install(config.faults.rules, instance_id="controller", role="controller")


class ControllerService:
    """Runs one cluster with `launcher`; `launcher_name` is told to whoever asks the registry.

    Args:
        notes: of the controllers before, where instances outlive them.
    """

    def __init__(
        self,
        config: ClusterConfig,
        launcher: Launcher,
        launcher_name: str,
        *,
        notes: ControllerNotes | None = None,
        clock: Clock | None = None,
    ) -> None:
        self.registry = RegistryServer(config.name, launcher_name, note=self._note)
        self._notes = notes
        if notes is not None:
            self.registry.held.update(notes.held)
            if notes.stopping:
                self.registry.stop_requested.set()
        self._launcher = launcher
        self._stop_deadline_s = config.stop_grace_s + _STOP_SLACK_S
        self._clock = clock or MonotonicClock()
        self._controller = Controller(desired_replicas(config))
        self._failures: dict[str, str] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        # Adopted, and not heard of yet.
        self._adopted: set[str] = set()

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Serve the registry, adopt what runs, and return the registry's address; `run` starts the rest.

        Raises:
            UnavailableError: the registry cannot listen there. May be tried again.
        """
        # The address first: two controllers on one machine cannot both have it.
        address = await self.registry.start(host, port)
        self._adopted.update(await self._launcher.adopt())
        self.registry.expect(self._adopted)
        if self._adopted:
            logger.info("took over %s", ", ".join(sorted(self._adopted)))
        return address

    def stop(self) -> None:
        """Make `run` end."""
        self.registry.stop_requested.set()
        self._note()

    async def run(self) -> None:
        """Keep the cluster as desired until told to stop, then leave nothing behind.

        Raises:
            SupersededError: another controller has taken over.
        """
        stop = self.registry.stop_requested
        is_over = False
        try:
            while not stop.is_set():
                await self._reconcile()
                await _wait(stop, _PERIOD_S)
            await self._stop_all()
            is_over = True
        finally:
            for task in self._tasks:
                task.cancel()
            if is_over or not self._launcher.outlives_controller:
                await self._launcher.close()
            await self.registry.close()

    def _note(self) -> None:
        if self._notes is not None:
            self._notes.write(self.registry.held, stopping=self.registry.stop_requested.is_set())

    async def _stop_all(self) -> None:
        self._controller.stop_all()
        until_s = self._clock.now_s() + self._stop_deadline_s
        while await self._launcher.observe() or self._tasks:
            if self._clock.now_s() >= until_s:
                logger.warning("instances did not end within %.0f s and are killed", self._stop_deadline_s)
                return
            await self._reconcile()
            await asyncio.sleep(_PERIOD_S)

    async def _reconcile(self) -> None:
        launched = await self._launcher.observe()
        self._controller.hold(self.registry.held)
        self.registry.desired = self._controller.desired
        silent_for = self.registry.silent_for()
        self._adopted &= silent_for.keys()
        stuck = {
            instance_id
            for instance_id, silent_s in silent_for.items()
            if silent_s > (_ADOPTED_STUCK_S if instance_id in self._adopted else _STUCK_S)
        }
        observed = [
            ObservedInstance(instance.instance_id, instance.alive, stuck=instance.instance_id in stuck)
            for instance in launched
        ]
        for action in self._controller.reconcile(observed, self._clock.now_s()):
            task = asyncio.create_task(self._perform(action))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        await self._publish(launched)

    async def _publish(self, launched: list[LaunchedInstance]) -> None:
        """Speak for the instances that do not speak for themselves."""
        known = {instance.instance_id: instance for instance in launched}
        statuses = []
        for start in self._controller.desired.values():
            instance = known.get(start.instance_id)
            if instance is not None and not instance.alive:
                await self.registry.remove(instance.instance_id)
                statuses.append(_status(start, "dead", instance.exit_text))
            elif start.instance_id in self._adopted and self.registry.is_partial:
                # It serves, as those know who have known it before: nothing else may be told of it.
                continue
            elif instance is None and start.instance_id in self._failures:
                statuses.append(_status(start, "dead", self._failures[start.instance_id]))
            else:
                statuses.append(_status(start, "starting", "starting the process"))
        await self.registry.set_unannounced(statuses)

    async def _perform(self, action: Action) -> None:
        ok = False
        try:
            if isinstance(action, StartInstance):
                logger.info("starting %s", action.instance_id)
                await self._launcher.start(action, self.registry.address)
            elif isinstance(action, StopInstance):
                because = f", silent for more than {_STUCK_S:.0f} s" if action.is_stuck else ""
                logger.info("stopping %s%s", action.instance_id, because)
                await self._launcher.stop(action.instance_id)
                logger.info("stopped %s", action.instance_id)
            else:
                await self._launcher.forget(action.instance_id)
                await self.registry.forget(action.instance_id)
            ok = True
        except SupersededError:
            # `run` ends of it.
            pass
        except BatonError as error:
            logger.error("%s", error)
            self._failures[action.instance_id] = str(error)
        except Exception as error:
            logger.exception("%s failed", action)
            self._failures[action.instance_id] = f"{type(error).__name__}: {error}"
        finally:
            if ok:
                self._failures.pop(action.instance_id, None)
            self._controller.finished(action.instance_id, ok=ok, now_s=self._clock.now_s())


def _status(start: StartInstance, state: str, detail: str) -> worker_pb2.WorkerStatus:
    return worker_pb2.WorkerStatus(instance_id=start.instance_id, role=start.role, state=state, detail=detail)


async def _wait(event: asyncio.Event, timeout_s: float) -> None:
    try:
        await asyncio.wait_for(event.wait(), timeout_s)
    except TimeoutError:
        return
