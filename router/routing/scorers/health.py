"""Health: how fast a worker's steps are, against its own best. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """1 at its best, or where it is not known; 1/2 where steps take twice as long as they could."""
    return [1 / max(view.slowness, 1.0) for view in candidates]
