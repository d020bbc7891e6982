"""Launcher `ray`: Ray places, starts and supervises; it is never on the path of a token.

    baton up ── RayHost ── ControllerActor "<name>-controller" (detached, on the node of `baton up`) ── RayLauncher
                                                  └─ per instance: a placement group per stage (STRICT_PACK, a bundle
                                                     per rank) and a RankActor per rank; see `ray_launcher.py`

Without `ray.address` a private Ray runs for this cluster alone: no dashboard, no prestarted workers, its files in a
folder of its own, and it ends with `baton up`, however that ends. `ray_environment.set_private_environment` must have
been called before this module is imported.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import math
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from baton.cluster.launchers import ray_reaper
from baton.cluster.launchers.instance_log import log_path, log_tail
from baton.cluster.launchers.ray_actors import ControllerActor
from baton.cluster.launchers.ray_daemons import only_needed_daemons
from baton.cluster.launchers.ray_launcher import KILL_DEADLINE_S
from baton.config import ClusterConfig
from baton.errors import ConfigError, UnavailableError

__all__ = ["RayHost"]

_CONTROLLER_DEADLINE_S = 60.0
_REAPER_DEADLINE_S = 15.0
# In the environment of every process of a private Ray, with its folder as value.
_MARK = "BATON_PRIVATE_RAY"
_PRIVATE_CPUS = 4
_OBJECT_STORE_BYTES = 80 << 20


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
        num_gpus = resources.get("GPU", 0.0) if self._config.device != "cpu" else 0.0
        name = f"{self._config.name}-controller"
        try:
            return (
                ray.remote(ControllerActor)
                .options(
                    name=name,
                    lifetime="detached",
                    num_cpus=0,
                    max_concurrency=4,
                    max_restarts=0,
                    scheduling_strategy=NodeAffinitySchedulingStrategy(
                        ray.get_runtime_context().get_node_id(), soft=False
                    ),
                )
                .remote(self._config.model_dump_json(), str(self._log_dir), self._gpu_share(num_gpus))
            )
        except ValueError as error:
            raise ConfigError(
                f"Ray has an actor {name!r} already; stop that cluster, or start this one with --set name=other"
            ) from error

    def _gpu_share(self, num_gpus: float) -> float:
        """GPUs of each worker rank: a whole one, or such a part that all ranks find room."""
        return 1.0 / math.ceil(self._config.num_worker_ranks / num_gpus) if num_gpus >= 1 else 0.0

    def _stop_controller(self) -> None:
        assert self._run is not None
        if not self._run.done():
            self._controller.stop.remote()
            # The controller waits for its instances as long as their grace lasts, and then kills them.
            concurrent.futures.wait([self._run], timeout=self._config.stop_grace_s + 2 * KILL_DEADLINE_S)
        ray.kill(self._controller)
