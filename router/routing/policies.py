"""The policies that ship, each a pair of profiles: pure.

    kv_aware       all scorers by their weights in cluster.yaml; a scorer that weighs nothing is left out
    least_loaded   the fewest requests (decode), the fewest prompt tokens ahead (prefill)
    round_robin    no scorers
    random         no scorers

Only the first is meant to be used; the others are there to compare it with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.config_routing import RoutingConfig, RoutingWeights
from baton.router.routing.facts import InstanceView
from baton.router.routing.handover_choice import Mode
from baton.router.routing.picker import at_random, highest, round_robin
from baton.router.routing.profile import Profile, WeightedScorer
from baton.router.routing.scene import Scene, Scorer
from baton.router.routing.scorers import affinity, balance, health, load, memory, pending, prefix, queue, topology

__all__ = ["SCORERS", "Policy", "make_policy"]

SCORERS: dict[str, Scorer] = {
    "prefix": prefix.score,
    "balance": balance.score,
    "queue": queue.score,
    "load": load.score,
    "memory": memory.score,
    "pending": pending.score,
    "affinity": affinity.score,
    "topology": topology.score,
    "health": health.score,
}
"""By the name of their weight."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """Two profiles, and whether prompts may be handed over."""

    name: str
    decode: Profile
    prefill: Profile
    mode: Mode


def make_policy(config: RoutingConfig) -> Policy:
    """The policy that a cluster's `routing` section asks for."""
    weighted = _weighted(config.weights)
    if config.policy == "kv_aware":
        # A prefill worker's KV blocks are free again in a moment.
        early = tuple(scorer for scorer in weighted if scorer.name != "memory")
        decode = Profile(role="decode", scorers=weighted, picker=highest)
        prefill = Profile(role="prefill", scorers=early, picker=highest)
    elif config.policy == "least_loaded":
        decode = Profile(role="decode", scorers=(WeightedScorer("requests", _few_requests, 1.0),), picker=highest)
        prefill = Profile(role="prefill", scorers=(WeightedScorer("tokens", _few_tokens, 1.0),), picker=highest)
    else:
        picker = round_robin if config.policy == "round_robin" else at_random
        decode, prefill = (Profile(role=role, scorers=(), picker=picker) for role in ("decode", "prefill"))
    return Policy(name=config.policy, decode=decode, prefill=prefill, mode=config.disaggregate)


def _weighted(weights: RoutingWeights) -> tuple[WeightedScorer, ...]:
    given = {name: float(getattr(weights, name)) for name in SCORERS}
    return tuple(WeightedScorer(name, SCORERS[name], weight) for name, weight in given.items() if weight)


def _few_requests(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    return [1 / (1 + view.requests) for view in candidates]


def _few_tokens(candidates: Sequence[InstanceView], scene: Scene) -> list[float]:
    return [1 / (1 + view.prefill_tokens) for view in candidates]
