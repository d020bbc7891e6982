"""Topology: whether a worker is near to the other half of the pair. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """1 on the partner's host, 0 on another one, 1/2 where a host is not known.

    While the partner is not chosen, any host with a worker of the other role counts as its host.
    """
    hosts = scene.partner_hosts if scene.partner is None else {scene.partner.host_id} - {""}
    if not hosts:
        return [0.5] * len(candidates)
    return [(1.0 if view.host_id in hosts else 0.0) if view.host_id else 0.5 for view in candidates]
