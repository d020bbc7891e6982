"""Where `/admin/` has from what it tells: the parts of one router, looked up when somebody asks."""

from __future__ import annotations

from typing import Any

from baton.config import ClusterConfig
from baton.router.admin import AdminSources
from baton.router.frontend import Frontend

__all__ = ["admin_sources"]


def admin_sources(config: ClusterConfig, frontend: Frontend, router_id: str) -> AdminSources:
    """What router `router_id` tells."""
    routing = config.routing

    def tell_routing() -> dict[str, Any]:
        return {
            "policy": routing.policy,
            "weights": routing.weights.model_dump(),
            "disaggregate": routing.disaggregate,
            "decisions": {
                "kept": len(frontend.dispatcher.decisions),
                "max_kept": frontend.dispatcher.decisions.max_kept,
            },
        }

    return AdminSources(
        router_id=router_id,
        frontend=frontend,
        trace=lambda request_id: None,
        routing=tell_routing,
        costs=dict,
    )
