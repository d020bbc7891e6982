"""Load: how few requests a worker has, and how fast it would write. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["BATCH_SCALE_REQUESTS", "score"]

BATCH_SCALE_REQUESTS = 64
"""So many requests halve the score, where a worker does not say how many its batch holds."""


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """Room in the batch, times the least predicted time between tokens over this worker's."""
    tpots_s = [prediction.tpot_s for prediction in scene.predictions(candidates)]
    least_s = min(tpots_s)
    return [
        _room(view) * (least_s / tpot_s if tpot_s > 0 else 1.0)
        for view, tpot_s in zip(candidates, tpots_s, strict=True)
    ]


def _room(view: InstanceView) -> float:
    scale = view.max_running_requests or BATCH_SCALE_REQUESTS
    return scale / (scale + view.requests)
