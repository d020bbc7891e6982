"""What the controller asks of a launcher: start, stop and observe instances. One implementation per way to run them.

An instance is one worker or router with all its ranks. A launcher owns the processes it started and those it adopted:
after `close` none is left. `start` returns once the processes exist, not once they are ready (readiness is told through
the registry).
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Protocol

from baton.cluster.controller import StartInstance
from baton.config import ClusterConfig
from baton.config_values import AUTO_HOST
from baton.errors import BatonError

__all__ = ["Host", "LaunchedInstance", "Launcher", "SupersededError", "host_of", "ray_installed", "resolve_launcher"]


class SupersededError(BatonError):
    """Another controller has taken over this one's instances: this one must touch nothing any more."""


@dataclass(frozen=True, slots=True)
class LaunchedInstance:
    """One instance as its launcher sees it.

    Attributes:
        alive: false once a process of it has ended: without one of its ranks an instance is nothing.
        exit_text: how it ended, with its last words, and which rank was the cause; empty while alive.
    """

    instance_id: str
    role: str
    alive: bool
    exit_text: str = ""


class Launcher(Protocol):
    """Starts and ends instances."""

    @property
    def outlives_controller(self) -> bool:
        """Whether instances go on when the controller's process dies, for the next one to `adopt`."""
        ...

    async def adopt(self) -> list[str]:
        """Take over what an earlier controller of this run has left running, and end what is left by halves.

        Called once, before anything else; returns the ids of what was taken over.
        """
        ...

    async def start(self, instance: StartInstance, registry_address: str) -> None:
        """Start the processes of an instance, in place of an ended one of the same id, of which nothing is left then.

        Raises:
            UnavailableError: there is no room for it.
        """
        ...

    async def stop(self, instance_id: str) -> None:
        """Ask an instance to end, wait out its grace, then kill it. No error when it has ended already."""
        ...

    async def forget(self, instance_id: str) -> None:
        """Drop the record of an ended instance."""
        ...

    async def observe(self) -> list[LaunchedInstance]:
        """Every instance started or adopted, and not forgotten.

        Raises:
            SupersededError: another controller has adopted them.
        """
        ...

    async def close(self) -> None:
        """Kill what is left, at once."""
        ...


class Host(Protocol):
    """Where the controller lives, as `baton up` sees it."""

    async def start(self) -> str:
        """Bring the controller up and return its registry's address.

        Raises:
            ConfigError: what it needs is not there.
        """
        ...

    async def wait(self) -> None:
        """Return when the controller has ended, asked by StopCluster or `stop`; one that died is not ended."""
        ...

    async def stop(self) -> None:
        """End the controller and every instance; nothing is left behind."""
        ...


def host_of(config: ClusterConfig, role: str, node_address: str) -> str:
    """Where a rank of `role` listens that runs on the node at `node_address`."""
    host = AUTO_HOST if role == "router" else config.pool(role).host
    return node_address if host == AUTO_HOST else host


def ray_installed() -> bool:
    """Whether Ray can be imported here; costs nothing but a look at the path."""
    return importlib.util.find_spec("ray") is not None


def resolve_launcher(wanted: str) -> str:
    """ "ray" or "local" for the configuration's "auto", "ray" or "local"."""
    return ("ray" if ray_installed() else "local") if wanted == "auto" else wanted
