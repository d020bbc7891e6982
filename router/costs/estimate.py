"""When a request would have its first token if it were taken now, for whoever decides whether to take it. Pure.

Cheap: no hashing, no scores. What workers hold of the prompt is left out unless it is given, so the estimate errs
upwards for prompts that are cached.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.costs import Costs
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.handover_choice import Mode, choose_handover

__all__ = ["estimate_ttft_s"]

_MAX_DECODES, _MAX_PREFILLS = 4, 4
"""Workers that are looked at: the least loaded."""


def estimate_ttft_s(views: Sequence[InstanceView], facts: RequestFacts, costs: Costs, mode: Mode) -> float | None:
    """Seconds until the first token by the best way there is; None while no decode worker is ready."""
    decodes = [view for view in views if view.role == "decode" and view.usable]
    prefills = [view for view in views if view.role == "prefill" and view.usable]
    if not decodes:
        return None
    decodes.sort(key=lambda view: (view.requests, view.instance_id))
    prefills.sort(key=lambda view: (view.prefill_tokens, view.instance_id))
    return min(
        choose_handover(decode, prefills[:_MAX_PREFILLS], facts, costs, mode).chosen.prediction.ttft_s
        for decode in decodes[:_MAX_DECODES]
    )
