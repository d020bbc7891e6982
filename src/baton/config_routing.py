"""`routing:` of `cluster.yaml`: how the router chooses workers. Pure values."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from baton.config_section import Section

__all__ = ["RoutingConfig", "RoutingWeights"]

_Weight = Annotated[float, Field(ge=0, le=100)]


class RoutingWeights(Section):
    """How much each scorer counts; each gives a worker a score in [0, 1], and the highest weighted sum is taken."""

    prefix: _Weight = 1.0
    """Prompt tokens that need no computing there, as a share of the prompt."""
    balance: _Weight = 2.0
    """How little work it was given lately, against its peers."""
    queue: _Weight = 0.5
    """How soon it would have the prompt computed, by the cost model."""
    load: _Weight = 0.5
    """How few requests it has, and how fast it would write."""
    memory: _Weight = 0.25
    """Share of its KV memory that is free."""
    pending: _Weight = 0.2
    """How few choices it has that its load reports do not show yet."""
    affinity: _Weight = 0.2
    """Whether the session's earlier requests were served there."""
    topology: _Weight = 0.1
    """Whether it is near to the other half of the pair."""
    health: _Weight = 0.5
    """How fast its steps are against its own best."""


class RoutingConfig(Section):
    """How the router chooses workers for a request, and whether the prompt is handed over at all."""

    policy: Literal["kv_aware", "round_robin", "random", "least_loaded"] = "kv_aware"
    """kv_aware weighs all scorers; the others are there to compare with."""
    weights: RoutingWeights = RoutingWeights()
    disaggregate: Literal["auto", "always", "never"] = "auto"
    """Whether prefill workers read prompts: auto decides for each by predicted times, see docs/routing.md."""
