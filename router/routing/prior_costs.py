"""Times before anything was measured: pure. Proportions of a small model on a CPU; no worker is told from another."""

from __future__ import annotations

from dataclasses import dataclass

from baton.router.routing.costs import Prediction
from baton.router.routing.facts import InstanceView

__all__ = ["PriorCosts"]

_LOCAL_CHUNK_TOKENS = 32
_STEP_COST_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class PriorCosts:
    """Implements `Costs`: a token of a prompt takes `token_s`, a step by itself `step_s`, a handover `handover_s`.

    A decode worker that writes answers reads a prompt in chunks beside them, which takes longer, and holds each of
    them up for the time of reading.
    """

    token_s: float = 2e-4
    step_s: float = 2e-3
    handover_s: float = 1e-2

    def predict(
        self, decode: InstanceView, prefill: InstanceView | None, *, new_tokens: int, cached_tokens: int
    ) -> Prediction:
        """What a prompt would take on this pair."""
        reader = prefill or decode
        queue_s = reader.prefill_tokens * self.token_s
        prefill_s = new_tokens * self.token_s
        tpot_s = self.step_s + decode.requests * self.token_s
        imposed_s = 0.0
        parts = {"queue": queue_s, "prefill": prefill_s, "step": self.step_s}
        if prefill is not None:
            parts["transfer"] = self.handover_s
        elif decode.running_requests:
            rows = max(decode.running_requests, _STEP_COST_TOKENS)
            parts["prefill"] = prefill_s * (_LOCAL_CHUNK_TOKENS + rows) / _LOCAL_CHUNK_TOKENS
            imposed_s = prefill_s * decode.running_requests
        return Prediction(ttft_s=sum(parts.values()), tpot_s=tpot_s, imposed_s=imposed_s, parts=parts)
