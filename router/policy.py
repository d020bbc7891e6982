"""Which workers serve a request: pure. Filter -> score in [0, 1] -> pick, once for decode, once for prefill.

    decode    ready, connected, large enough, not set aside; scored by free KV memory, load and cached prefix
    prefill   ready, not set aside; scored by the prompt tokens it still has to compute
              none at all ("the decode worker prefills") when the uncached part is short, when log-probabilities of the
              prompt are asked for, when no prefill worker is ready, or when all are so busy that the decode worker,
              little by little beside its streams, will have the prompt computed far sooner

A load report is some milliseconds old, so this router's own unfinished choices count as load until they are reported:
the larger of the two numbers is taken, never the sum.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from baton.errors import InvalidRequestError, UnavailableError
from baton.router.routing.facts import InstanceView, RequestFacts

__all__ = ["Decision", "InstanceView", "PolicyConfig", "RequestFacts", "choose", "local_prefill_cost"]

_BATCH_SCALE_REQUESTS = 16
_PREFILL_SCALE_TOKENS = 4096
_STEP_COST_TOKENS = 16
"""Prompt tokens that take as long as a step does by itself, see `engine.scheduler.STEP_COST_TOKENS`."""
_STEADINESS = 1.5
"""How many times longer a prompt must have to wait for a prefill worker before it may slow running streams down."""
_WEIGHT_KV, _WEIGHT_LOAD, _WEIGHT_PREFIX = 0.25, 0.35, 0.4


@dataclass(frozen=True, slots=True, kw_only=True)
class PolicyConfig:
    """Knobs of the choice."""

    local_prefill_threshold_tokens: int = 64
    max_local_prefill_tokens: int = 32
    """Prompt tokens that a decode worker computes in a step in which answers stream."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """The pair, and why.

    Attributes:
        prefill_id: None: the decode worker prefills itself.
        cached_tokens: what the decode worker probably holds already.
        uncached_tokens: what must be computed, by whom it may be.
        reasons: one line per stage, for logs and `explain`.
    """

    decode_id: str
    prefill_id: str | None
    cached_tokens: int
    uncached_tokens: int
    reasons: tuple[str, ...]

    def as_dict(self) -> dict[str, Any]:
        """How it came about, as JSON."""
        handover: dict[str, Any] = {
            "mode": "auto",
            "options": [],
            "chosen": self.prefill_id,
            "reason": "; ".join(self.reasons),
        }
        pair = {"decode": self.decode_id, "prefill": self.prefill_id}
        picks: dict[str, Any] = {stage: {"candidates": [], "chosen": chosen} for stage, chosen in pair.items()}
        return {"policy": "", **picks, "handover": handover}


def choose(instances: Sequence[InstanceView], facts: RequestFacts, config: PolicyConfig) -> Decision:
    """The pair for one request.

    Raises:
        InvalidRequestError: no decode worker's KV memory can hold the prompt.
        UnavailableError: no decode worker is ready.
    """
    decode = _pick(_decode_candidates(instances, facts), lambda view: decode_score(view, facts))
    cached = _cached_tokens(decode, facts)
    uncached = facts.prompt_tokens - cached
    reasons = [f"decode {decode.instance_id}: score {decode_score(decode, facts):.3f}, {decode.requests} requests"]
    prefills = [view for view in instances if view.role == "prefill" and view.usable]
    preferred = _preferred(prefills, facts)
    local_because = ""
    if facts.wants_prompt_logprobs:
        local_because = "prompt log-probabilities are asked for"
    elif uncached <= config.local_prefill_threshold_tokens:
        local_because = f"{uncached} uncached tokens <= {config.local_prefill_threshold_tokens}"
    elif not preferred:
        local_because = "no prefill worker is ready"
    prefill = None if local_because else _pick(preferred, prefill_score)
    if prefill is not None:
        there, here = prefill.prefill_tokens + uncached, local_prefill_cost(decode, uncached, config)
        if here * _STEADINESS < there:
            local_because = f"{there} tokens to wait for on {prefill.instance_id}, as long as {here:.0f} here"
            prefill = None
    if prefill is None:
        reasons.append(f"prefill on the decode worker: {local_because}")
    else:
        reasons.append(f"prefill {prefill.instance_id}: score {prefill_score(prefill):.3f}, {uncached} uncached tokens")
    return Decision(
        decode_id=decode.instance_id,
        prefill_id=prefill.instance_id if prefill else None,
        cached_tokens=cached,
        uncached_tokens=uncached,
        reasons=tuple(reasons),
    )


def decode_score(view: InstanceView, facts: RequestFacts) -> float:
    """How well this decode worker suits, in [0, 1]."""
    load = 1 / (1 + view.requests / _BATCH_SCALE_REQUESTS)
    prefix = _cached_tokens(view, facts) / facts.prompt_tokens
    return _WEIGHT_KV * view.kv_available_share + _WEIGHT_LOAD * load + _WEIGHT_PREFIX * prefix


def prefill_score(view: InstanceView) -> float:
    """How soon this prefill worker would begin, in [0, 1]."""
    return 1 / (1 + view.prefill_tokens / _PREFILL_SCALE_TOKENS)


def local_prefill_cost(view: InstanceView, uncached: int, config: PolicyConfig) -> float:
    """When this decode worker would have a prompt computed: in prompt tokens that a prefill worker computes meanwhile.

    Beside running streams each step takes `max_local_prefill_tokens` of the prompt, and as long besides as the decode
    rows take: about a token's time each, and never less than a step's own cost. It holds where workers of both kinds
    have as many cores.
    """
    tokens = view.prefill_tokens + uncached
    if view.running_requests == 0:
        return tokens
    chunk = config.max_local_prefill_tokens
    return tokens * (chunk + max(view.running_requests, _STEP_COST_TOKENS)) / chunk


def _decode_candidates(instances: Sequence[InstanceView], facts: RequestFacts) -> list[InstanceView]:
    usable = [view for view in instances if view.role == "decode" and view.usable]
    if not usable:
        known = sum(view.role == "decode" for view in instances)
        raise UnavailableError(f"no decode worker is ready ({known} known); retry shortly")
    fitting = [
        view
        for view in usable
        if not view.kv_blocks_total or view.kv_blocks_total * view.block_size > facts.prompt_tokens
    ]
    if not fitting:
        largest = max(view.kv_blocks_total * view.block_size for view in usable)
        raise InvalidRequestError(
            f"the prompt has {facts.prompt_tokens} tokens and the largest worker's KV memory holds {largest};"
            " shorten it, or raise kv.memory",
            param="prompt",
            code="context_length_exceeded",
        )
    return _preferred(fitting, facts)


def _preferred(views: Sequence[InstanceView], facts: RequestFacts) -> list[InstanceView]:
    """Rather one that is slow than one that has just failed."""
    sound = [view for view in views if view.instance_id not in facts.avoid] or list(views)
    return [view for view in sound if view.instance_id not in facts.ejected] or sound


def _cached_tokens(view: InstanceView, facts: RequestFacts) -> int:
    # One prompt token is always computed, whatever is cached.
    held = facts.prefix_blocks.get(view.instance_id, 0) * view.block_size
    return max(min(held, facts.prompt_tokens - 1), 0)


def _pick(candidates: Sequence[InstanceView], score: Callable[[InstanceView], float]) -> InstanceView:
    return min(candidates, key=lambda view: (-score(view), view.own_requests, view.instance_id))
