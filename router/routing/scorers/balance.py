"""Balance: how little work a worker was given lately, against its peers. Pure.

Queues show who is behind now; where queues are short they show nothing, and a popular prefix would draw ever more to
one worker. What each was given over the last minutes tells them apart long before a queue grows.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["SPAN_PROMPTS", "score"]

SPAN_PROMPTS = 25
"""So many prompts like this one ahead of the mean, and a worker scores 0; as many behind, and it scores 1."""


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """0.5 for the mean, and less for each token of prompt that a worker was given beyond it."""
    recent = scene.facts.recent_tokens
    if not recent:
        return [0.5] * len(candidates)
    tokens = [recent.get(view.instance_id) for view in candidates]
    known = [each for each in tokens if each is not None]
    if not known:
        return [0.5] * len(candidates)
    mean = sum(known) / len(known)
    span = 2 * SPAN_PROMPTS * max(scene.facts.prompt_tokens, 1)
    return [0.5 if each is None else min(max(0.5 - (each - mean) / span, 0.0), 1.0) for each in tokens]
