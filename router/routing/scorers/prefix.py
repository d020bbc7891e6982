"""Prefix overlap: the share of the prompt that need not be computed there. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene, cached_tokens

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """Tokens of prefill saved over tokens of the prompt."""
    facts = scene.facts
    if not facts.prefix_blocks:
        return [0.0] * len(candidates)
    return [cached_tokens(view, facts) / facts.prompt_tokens for view in candidates]
