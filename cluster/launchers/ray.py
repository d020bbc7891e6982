"""Launcher `ray`: Ray places, starts and supervises; it is never on the path of a token.

    baton up ── RayHost ── ControllerActor "<name>-controller" (detached) ── RayLauncher
                                                                              └─ per instance: a placement group
                                                                                 (STRICT_PACK, a bundle per rank) and
                                                                                 a RankActor per rank

Without `ray.address` a private Ray runs for this cluster alone: no dashboard, no prestarted workers, its files in a
folder of its own, and it ends with `baton up`, however that ends. `ray_environment.set_private_environment` must have
been called before this module is imported.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.placement_group import placement_group, remove_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from baton.cluster.controller import StartInstance
from baton.cluster.launchers import ray_reaper
from baton.cluster.launchers.base import LaunchedInstance
from baton.cluster.launchers.instance_log import log_path, log_tail
from baton.cluster.launchers.ray_actors import ControllerActor, RankActor
from baton.cluster.launchers.ray_daemons import only_needed_daemons
from baton.config import ClusterConfig
from baton.errors import ConfigError, UnavailableError

__all__ = ["RayHost", "RayLauncher"]

_PLACEMENT_DEADLINE_S = 30.0
_CONTROLLER_DEADLINE_S = 60.0
_KILL_DEADLINE_S = 5.0
_REAPER_DEADLINE_S = 15.0
# In the environment of every process of a private Ray, with its folder as value.
_MARK = "BATON_PRIVATE_RAY"
_PRIVATE_CPUS = 4
_OBJECT_STORE_BYTES = 80 << 20


@dataclass(slots=True)
class _Launched:
    role: str
    group: Any
    actors: list[Any]
    runs: list[concurrent.futures.Future[str]]


class RayLauncher:
    """Runs inside the controller actor. All ranks of an instance are on one node."""

    def __init__(self, config: ClusterConfig, log_dir: Path, num_gpus_per_rank: float) -> None:
        self._config = config
        self._log_dir = log_dir
        self._num_gpus = num_gpus_per_rank
        self._launched: dict[str, _Launched] = {}

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher.start`."""
        old = self._launched.pop(instance.instance_id, None)
        if old is not None:
            await asyncio.to_thread(_destroy, old)
        self._launched[instance.instance_id] = await asyncio.to_thread(self._start, instance, registry_address)

    async def stop(self, instance_id: str) -> None:
        """Ask every rank, wait out the grace, kill."""
        launched = self._launched.get(instance_id)
        if launched is None:
            return
        for actor, run in zip(launched.actors, launched.runs, strict=True):
            if not run.done():
                actor.stop.remote()
        await asyncio.to_thread(concurrent.futures.wait, launched.runs, self._config.stop_grace_s)
        await asyncio.to_thread(_destroy, launched)

    async def forget(self, instance_id: str) -> None:
        """See `Launcher.forget`."""
        launched = self._launched.pop(instance_id, None)
        if launched is not None:
            await asyncio.to_thread(_destroy, launched)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher.observe`."""
        return [
            LaunchedInstance(
                instance_id, launched.role, not _any_done(launched), self._exit_text(instance_id, launched)
            )
            for instance_id, launched in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher.close`."""
        for launched in self._launched.values():
            await asyncio.to_thread(_destroy, launched)

    def _start(self, instance: StartInstance, registry_address: str) -> _Launched:
        bundle = {"CPU": self._config.ray.cpus_per_rank}
        num_gpus = self._num_gpus if instance.role != "router" else 0.0
        if num_gpus:
            bundle["GPU"] = num_gpus
        num_ranks = 1
        actor_class: Any = ray.remote(RankActor)
        group = placement_group(
            [bundle] * num_ranks, strategy="STRICT_PACK", name=f"{self._config.name}-{instance.instance_id}"
        )
        if not group.wait(timeout_seconds=_PLACEMENT_DEADLINE_S):
            remove_placement_group(group)
            raise UnavailableError(
                f"Ray found no room for {instance.instance_id} ({bundle} on one node) within"
                f" {_PLACEMENT_DEADLINE_S:.0f} s; free some, or lower ray.cpus_per_rank"
            )
        actors = [
            actor_class.options(
                name=f"{self._config.name}-{instance.instance_id}-rank{rank}-{os.urandom(3).hex()}",
                num_cpus=bundle["CPU"],
                num_gpus=num_gpus,
                max_concurrency=4,
                max_restarts=0,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, placement_group_bundle_index=rank),
            ).remote(
                self._config.model_dump_json(),
                instance.role,
                instance.instance_id,
                registry_address,
                str(self._log_dir),
            )
            for rank in range(num_ranks)
        ]
        return _Launched(instance.role, group, actors, [actor.run.remote().future() for actor in actors])

    def _exit_text(self, instance_id: str, launched: _Launched) -> str:
        for run in launched.runs:
            if not run.done():
                continue
            error = run.exception(timeout=0)
            if error is None:
                return run.result(timeout=0) or "ended"
            last = log_tail(self._log_dir, instance_id, 1)
            return f"its process died ({type(error).__name__})" + (f", its last line: {last[0]}" if last else "")
        return ""


class RayHost:
    """Runs in `baton up`: brings Ray and the controller actor up and down."""

    def __init__(self, config: ClusterConfig, log_dir: Path) -> None:
        self._config = config
        self._log_dir = log_dir
        self._reaper: subprocess.Popen[bytes] | None = None
        self._controller: Any = None
        self._run: concurrent.futures.Future[None] | None = None

    async def start(self) -> str:
        """Start Ray where there is none, then the controller; return the registry's address.

        Raises:
            ConfigError: `ray.address` does not answer, or has a cluster of this name.
        """
        # On this very thread: the kernel ends Ray's processes when the thread that started them ends.
        self._init()
        self._controller = await asyncio.to_thread(self._start_controller)
        self._run = self._controller.run.remote().future()
        told: concurrent.futures.Future[str] = self._controller.address.remote().future()
        await asyncio.to_thread(
            concurrent.futures.wait, [told, self._run], _CONTROLLER_DEADLINE_S, concurrent.futures.FIRST_COMPLETED
        )
        if not told.done() or told.exception() is not None:
            last = log_tail(self._log_dir, "controller", 1)
            raise UnavailableError(
                f"the controller actor did not start within {_CONTROLLER_DEADLINE_S:.0f} s"
                f" ({last[0] if last else 'no output'}); its log is {log_path(self._log_dir, 'controller')}"
            )
        return told.result()

    async def wait(self) -> None:
        """Return when the controller has ended, because of StopCluster or `stop`."""
        assert self._run is not None
        # Shielded: who stops waiting must not cancel the run itself.
        await asyncio.shield(asyncio.wrap_future(self._run))

    async def stop(self) -> None:
        """End instances, controller, and the private Ray."""
        try:
            if self._controller is not None:
                await asyncio.to_thread(self._stop_controller)
        finally:
            ray.shutdown()
            if self._reaper is not None:
                await asyncio.to_thread(self._reaper.communicate, timeout=_REAPER_DEADLINE_S)
                if self._reaper.returncode:
                    raise UnavailableError("some processes of the private Ray do not end even when killed")

    def _init(self) -> None:
        common: dict[str, Any] = {
            "namespace": "baton",
            "log_to_driver": False,
            "configure_logging": False,
        }
        if self._config.ray.address is not None:
            try:
                ray.init(address=self._config.ray.address, **common)
            except (ConnectionError, ValueError, RuntimeError) as error:
                raise ConfigError(f"ray.address: {self._config.ray.address} does not answer ({error})") from error
            return
        # Short, since Ray's sockets below it must fit 107 characters.
        folder = tempfile.mkdtemp(prefix="baton-")
        self._reaper = subprocess.Popen(
            [sys.executable, "-I", ray_reaper.__file__, f"{_MARK}={folder}", folder],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        os.environ[_MARK] = folder
        with only_needed_daemons():
            ray.init(
                address="local",
                num_cpus=max(_PRIVATE_CPUS, os.cpu_count() or 1),
                include_dashboard=False,
                object_store_memory=_OBJECT_STORE_BYTES,
                _temp_dir=folder,
                **common,
            )

    def _start_controller(self) -> Any:
        resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
        num_ranks = self._config.prefill.replicas + self._config.decode.replicas
        num_gpus = resources.get("GPU", 0.0) if self._config.device != "cpu" else 0.0
        name = f"{self._config.name}-controller"
        try:
            return (
                ray.remote(ControllerActor)
                .options(name=name, lifetime="detached", num_cpus=0, max_concurrency=4, max_restarts=0)
                .remote(self._config.model_dump_json(), str(self._log_dir), min(1.0, num_gpus / num_ranks))
            )
        except ValueError as error:
            raise ConfigError(
                f"Ray has an actor {name!r} already; stop that cluster, or start this one with --set name=other"
            ) from error

    def _stop_controller(self) -> None:
        assert self._run is not None
        if not self._run.done():
            self._controller.stop.remote()
            # The controller waits for its instances as long as their grace lasts, and then kills them.
            concurrent.futures.wait([self._run], timeout=self._config.stop_grace_s + 2 * _KILL_DEADLINE_S)
        ray.kill(self._controller)


def _any_done(launched: _Launched) -> bool:
    return any(run.done() for run in launched.runs)


def _destroy(launched: _Launched) -> None:
    for actor in launched.actors:
        ray.kill(actor)
    remove_placement_group(launched.group)
