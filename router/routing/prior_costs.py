"""Times before anything was measured: pure. Proportions of a small model on a CPU; no worker is told from another."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.router.routing.costs import Prediction
from baton.router.routing.facts import InstanceView

__all__ = ["PriorCosts"]

_STEP_COST_TOKENS = 16
"""Prompt tokens that take as long as a step does by itself, see `engine.scheduler.STEP_COST_TOKENS`."""
_STEADINESS = 0.5
"""Answers to come are held up, too: by this share of the time in which a decode worker reads prompts."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorCosts:
    """Implements `Costs`: a token of a prompt takes `token_s`, a handover as long as `handover_tokens` of them.

    A decode worker that writes answers reads at most `local_chunk_tokens` of a prompt in a step, and each step takes as
    long besides as its answers do.
    """

    token_s: float = 2e-4
    handover_tokens: int = 32
    local_chunk_tokens: int = 32

    def predict(
        self,
        decode: InstanceView,
        prefill: InstanceView | None,
        *,
        new_tokens: int,
        cached_tokens: int,
        beside: Sequence[InstanceView] = (),
    ) -> Prediction:
        """What a prompt would take on this pair."""
        token_s = self.token_s
        rows = max(decode.requests, _STEP_COST_TOKENS)
        if prefill is not None:
            queue_s, prefill_s = prefill.prefill_tokens * token_s, new_tokens * token_s
            transfer_s = self.handover_tokens * token_s
            return Prediction(
                ttft_s=queue_s + prefill_s + transfer_s,
                tpot_s=rows * token_s,
                parts={"queue": queue_s, "prefill": prefill_s, "transfer": transfer_s},
            )
        if decode.running_requests:
            chunk = self.local_chunk_tokens
            token_s *= (chunk + max(decode.running_requests, _STEP_COST_TOKENS)) / chunk
        queue_s, prefill_s = decode.prefill_tokens * token_s, new_tokens * token_s
        return Prediction(
            ttft_s=queue_s + prefill_s,
            tpot_s=rows * self.token_s,
            imposed_s=(queue_s + prefill_s) * _STEADINESS,
            parts={"queue": queue_s, "prefill": prefill_s},
        )
