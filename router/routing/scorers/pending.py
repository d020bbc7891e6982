"""Pending: choices that no load report shows yet, this router's and other routers'. Pure.

Reports are some milliseconds old. Without this, all requests of these milliseconds would go to the one worker that
looked best in the last report.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """1 where reports show everything; 1/2 with one request that they do not show, 1/3 with two."""
    return [1 / (1 + _unseen_requests(view)) for view in candidates]


def _unseen_requests(view: InstanceView) -> int:
    """Requests that routers say to be there, beyond all that the worker reports."""
    return max(view.own_requests - view.running_requests - view.waiting_requests, 0)
