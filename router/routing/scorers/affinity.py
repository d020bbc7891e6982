"""Affinity: whether the session's earlier requests were served there. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """1 for the worker that the session knows, 0 for others."""
    known = scene.facts.session_instances
    return [1.0 if known.get(view.role) == view.instance_id else 0.0 for view in candidates]
