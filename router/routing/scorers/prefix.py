"""Prefix overlap: the share of the prompt that need not be computed there. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from baton.router.routing.facts import InstanceView
from baton.router.routing.scene import Scene

__all__ = ["score"]


def score(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    """Tokens of prefill saved over tokens of the prompt."""
    return [cached / scene.facts.prompt_tokens for cached in scene.cached_tokens(candidates)]
