"""Memory: the share of its KV blocks that a worker has free, or could have. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """1 where nothing is reported yet."""
    return [view.kv_available_share for view in candidates]
