"""Starts and ends simulated processes for the controller, which they outlive, and opens the doors of routers."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from tests.simulation.process import Process

from baton.cluster.controller import StartInstance
from baton.cluster.launchers.base import LaunchedInstance

if TYPE_CHECKING:
    from tests.simulation.cluster import SimCluster

__all__ = ["SimDoors", "SimLauncher"]


class SimDoors:
    """Stands in for the router's HTTP and gRPC servers: a frontend whose doors are open can be asked by clients."""

    def __init__(self, sim: SimCluster, process: Process, frontend: Any) -> None:
        self._sim, self._process, self._frontend = sim, process, frontend
        self.http_url = self.grpc_address = ""
        self.inference = self

    @property
    def are_open(self) -> bool:
        """See `Doors`."""
        return self.http_url != ""

    async def open(self) -> None:
        """See `Doors`."""
        self.http_url, self.grpc_address = "http://simulated", "simulated:1"
        self._sim.frontends[self._process] = self._frontend

    async def update_health(self) -> None:
        """Nobody asks."""

    def turn_away(self) -> None:
        """See `Doors`."""

    async def close(self) -> None:
        """See `Doors`."""


class SimLauncher:
    """`Launcher` over simulated processes; lives in the controller's, they outlive it."""

    outlives_controller = True

    def __init__(self, cluster: SimCluster) -> None:
        self._cluster = cluster
        self._launched = cluster.launched

    async def adopt(self) -> list[str]:
        """See `Launcher`."""
        return [instance_id for instance_id, (_, process) in self._launched.items() if not process.is_dead]

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """See `Launcher`."""
        await asyncio.sleep(0.005)
        process = self._cluster.launch(instance, registry_address, f"start-{len(self._cluster.all_processes)}")
        self._launched[instance.instance_id] = instance.role, process

    async def stop(self, instance_id: str) -> None:
        """See `Launcher`."""
        launched = self._launched.get(instance_id)
        if launched is None or launched[1].is_dead:
            return
        process = launched[1]
        stop = process.stop
        if stop is not None:
            process.loop.call_soon(stop.set)
        grace_s = self._cluster.config.stop_grace_s
        loop = asyncio.get_running_loop()
        end_s = loop.time() + grace_s
        while not process.is_dead and loop.time() < end_s:
            await asyncio.sleep(0.05)
        process.kill("killed after its grace")

    async def forget(self, instance_id: str) -> None:
        """See `Launcher`."""
        self._launched.pop(instance_id, None)

    async def observe(self) -> list[LaunchedInstance]:
        """See `Launcher`."""
        return [
            LaunchedInstance(instance_id, role, not process.is_dead, process.exit_text)
            for instance_id, (role, process) in self._launched.items()
        ]

    async def close(self) -> None:
        """See `Launcher`."""
        for _, process in self._launched.values():
            process.kill("the launcher ends")
