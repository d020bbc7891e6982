"""What Ray still has of a cluster: looked up by name, adopted by the launcher or ended here. Blocking."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

import ray
import ray._private.state as ray_state
import ray.util
from ray.util.placement_group import get_placement_group, placement_group_table, remove_placement_group

from baton.cluster.launchers.rank_names import Leftovers, Shape, sort_out

__all__ = ["end_all", "end_named", "find_leftovers", "node_id_of"]

logger = logging.getLogger(__name__)

_POLL_S = 0.05


def end_all(cluster: str, *, deadline_s: float) -> None:
    """End whatever still has a name of `cluster`."""
    found = find_leftovers(cluster, None, lambda role: Shape(0, 0))
    end_named(found.actors, found.groups, deadline_s=deadline_s)


def find_leftovers(cluster: str, run: str | None, shape_of: Callable[[str], Shape]) -> Leftovers:
    """Everything with a name of `cluster` that Ray has not ended; see `sort_out`."""
    tables: list[dict[str, Any]] = list(placement_group_table().values())
    groups = [table["name"] for table in tables if table["state"] != "REMOVED"]
    return sort_out(cluster, run, ray.util.list_named_actors(), groups, shape_of)


def end_named(actors: Iterable[str], groups: Iterable[str], *, deadline_s: float) -> None:
    """Kill actors and remove groups by name, those that are there; wait until Ray has forgotten the actors' names."""
    # Each is forgotten by its process's end, which Ray waits for.
    killed = [name for name in actors if _kill(name)]
    for name in groups:
        with suppress(ValueError):
            remove_placement_group(get_placement_group(name))
    until_s = time.monotonic() + deadline_s
    while killed:
        killed = [name for name in killed if _find(name) is not None]
        if killed and time.monotonic() >= until_s:
            logger.warning("Ray has not ended %s within %.0f s", ", ".join(killed), deadline_s)
            return
        if killed:
            time.sleep(_POLL_S)


def node_id_of(actor: Any) -> str:
    """Where an actor runs; empty while Ray has not placed it."""
    table: dict[str, Any] = ray_state.actors(actor._actor_id.hex())
    return str(table.get("Address", {}).get("NodeID", ""))


def _kill(name: str) -> bool:
    actor = _find(name)
    if actor is not None:
        ray.kill(actor)
    return actor is not None


def _find(name: str) -> Any:
    try:
        return ray.get_actor(name)
    except ValueError:
        return None
