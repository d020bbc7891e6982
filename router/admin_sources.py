"""Where `/admin/` has from what it tells: the parts of one router, looked up when somebody asks."""

from __future__ import annotations

from typing import Any

from baton.config import ClusterConfig
from baton.router.admin import AdminSources
from baton.router.admin_views import MAX_INSTANCES
from baton.router.frontend import Frontend
from baton.router.timelines import as_json

__all__ = ["admin_sources"]


def admin_sources(config: ClusterConfig, frontend: Frontend, router_id: str) -> AdminSources:
    """What router `router_id` tells."""
    routing, dispatcher = config.routing, frontend.dispatcher
    decisions, index = dispatcher.decisions, dispatcher.news.index

    def signal(instance_id: str) -> dict[str, Any]:
        """How true what the router believes of a worker's cache is."""
        return {
            "freshness": index.freshness(instance_id).value,
            "reason": index.reason(instance_id),
            "blocks": index.num_held(instance_id),
        }

    def about(instance_id: str) -> dict[str, Any]:
        return {
            "health": dispatcher.health_of(instance_id),
            "signal": signal(instance_id),
            "steps": dispatcher.costs.steps_of(instance_id),
        }

    def tell_routing() -> dict[str, Any]:
        ids = sorted(instance.instance_id for instance in frontend.table.all())[:MAX_INSTANCES]
        return {
            "policy": routing.policy,
            "weights": routing.weights.model_dump(),
            "disaggregate": routing.disaggregate,
            "decisions": {"kept": len(decisions), "max_kept": decisions.max_kept},
            "prefix_index": {
                "blocks": len(index),
                "stale": index.stale(),
                "workers": {instance_id: signal(instance_id) for instance_id in ids},
            },
        }

    def trace(request_id: str) -> dict[str, Any] | None:
        found = frontend.client.timelines.find(request_id)
        return as_json(found) if found else None

    return AdminSources(
        router_id=router_id,
        frontend=frontend,
        trace=trace,
        about=about,
        routing=tell_routing,
        costs=dispatcher.costs.report,
    )
