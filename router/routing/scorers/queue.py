"""Queue: how soon a worker would have the prompt read, by the cost model. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """1 for the soonest; half of it for one that comes later by as long as reading the whole prompt takes.

    A delay is measured in the prompt's own time, which makes the score the same on a machine ten times as fast.
    """
    delays_s = [prediction.ttft_s for prediction in scene.predictions(candidates)]
    least_s = min(delays_s)
    if least_s == max(delays_s):
        return [1.0] * len(delays_s)
    unit_s = max(_read_s(candidates, scene), 1e-9)
    return [unit_s / (unit_s + (delay_s - least_s)) for delay_s in delays_s]


def _read_s(candidates: Sequence[InstanceView], scene: Scene) -> float:
    """The whole prompt on an idle worker: a measure that no load moves."""
    first = min(candidates, key=lambda view: view.instance_id)
    idle = InstanceView(instance_id=first.instance_id, role=first.role, block_size=first.block_size)
    decode, prefill = (idle, None) if scene.partner is None else (scene.partner, idle)
    whole = scene.costs.predict(decode, prefill, new_tokens=scene.facts.prompt_tokens, cached_tokens=0)
    return whole.parts.get("prefill", whole.ttft_s)
