"""Whether a request that comes now would be answered in time, and until when one that waits still can be: pure.

    predicted TTFT = (wait in this router's queue + what the cost model says of the workers) x correction

The correction is the ratio of what was predicted and what came that PRUDENCE of the last requests stayed within, and
PRUDENCE_IN_QUEUE for who has to wait: under overload the queue grows until the prediction meets the bound, so a
prediction that is met half of the time would have half of the answers too late. Where others wait, what is refused is
taken by the next one, and an answer that is too late was for nothing; where nobody does, a refusal is a loss. It is
bounded by MAX_CORRECTION: a model that is wrong must not shut the door.

A request is refused at the door when the prediction passes `slack` times what it asks for. One that waits is given up
when its turn comes too late by the same reckoning, and in any case at the moment from which even the fastest of the
last answers would be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from baton.router.admission.pace import Pace, Recent

__all__ = ["MAX_CORRECTION", "PRUDENCE", "PRUDENCE_IN_QUEUE", "EarlyRefusal", "Limit", "Verdict"]

MAX_CORRECTION = 2.0
PRUDENCE = 0.85
PRUDENCE_IN_QUEUE = 0.99
_TYPICAL, _FASTEST = 0.5, 0.05


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """What a request asks for.

    Attributes:
        ttft_s: from its arrival to the first token; None: whatever it takes.
        deadline_s: when it ends, answered or not; a moment.
    """

    ttft_s: float | None
    deadline_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What is predicted.

    Attributes:
        wait_s, service_s: in the queue, and from there to the first token; not corrected.
        ttft_s: to the first token, corrected.
        late_s: by how much too late that is; at most 0: in time.
        reason: "slo" or "deadline", whichever would be missed; "" where neither.
    """

    wait_s: float
    service_s: float
    ttft_s: float
    late_s: float
    reason: str


class EarlyRefusal:
    """Predicts, and learns how well.

    Args:
        slack: how far a prediction may pass what is asked for before it is believed.
    """

    def __init__(self, *, slack: float) -> None:
        assert slack > 0, slack
        self._slack = slack
        self._ratios = Recent()
        self._services = Recent()

    def correction(self, *, waits: bool) -> float:
        """What predictions are multiplied by; `waits`: there is a queue, and others in it."""
        ratio = self._ratios.quantile(PRUDENCE_IN_QUEUE if waits else PRUDENCE)
        return 1.0 if ratio is None else min(max(ratio, 1 / MAX_CORRECTION), MAX_CORRECTION)

    def served(self, service_s: float, *, ttft_s: float, predicted_s: float) -> None:
        """A first token came `service_s` after its request was dispatched, `ttft_s` after it arrived.

        Args:
            predicted_s: what was thought of the latter, not corrected; 0: nothing.
        """
        self._services.add(service_s)
        if predicted_s > 0:
            self._ratios.add(ttft_s / predicted_s)

    def judge(
        self, limit: Limit, pace: Pace, *, ahead_tokens: float, predicted_s: float | None, now_s: float
    ) -> Verdict:
        """What becomes of a request that comes now, with so much work ahead of it and itself."""
        wait_s = pace.wait_s(ahead_tokens, now_s) or 0.0 if ahead_tokens > 0 else 0.0
        service_s = predicted_s if predicted_s is not None else self._services.quantile(_TYPICAL) or 0.0
        ttft_s = (wait_s + service_s) * self.correction(waits=ahead_tokens > 0)
        late_slo_s = -math.inf if limit.ttft_s is None else ttft_s - self._slack * limit.ttft_s
        late_deadline_s = now_s + ttft_s - limit.deadline_s
        late_s = max(late_slo_s, late_deadline_s)
        reason = "" if late_s <= 0 else "slo" if late_slo_s >= late_deadline_s else "deadline"
        return Verdict(wait_s=wait_s, service_s=service_s, ttft_s=ttft_s, late_s=late_s, reason=reason)

    def misses(self, limit: Limit, *, predicted_s: float | None, arrival_s: float, now_s: float) -> str:
        """What a request would miss whose turn it is now; "": nothing."""
        typical_s = self._services.quantile(_TYPICAL) or 0.0
        service_s = self.correction(waits=True) * (typical_s if predicted_s is None else min(typical_s, predicted_s))
        if limit.ttft_s is not None and now_s + service_s > arrival_s + self._slack * limit.ttft_s:
            return "slo"
        return "deadline" if now_s + min(service_s, (limit.deadline_s - arrival_s) / 2) > limit.deadline_s else ""

    def give_up_at_s(self, limit: Limit, *, arrival_s: float) -> tuple[float, str]:
        """From when on a request that waits cannot be answered in time, and what it would miss."""
        fastest_s = self._services.quantile(_FASTEST) or 0.0
        # Whatever was seen, a request has some of its time to wait in.
        by_deadline = limit.deadline_s - min(fastest_s, (limit.deadline_s - arrival_s) / 2)
        if limit.ttft_s is None:
            return by_deadline, "deadline"
        by_slo = arrival_s + max(self._slack * limit.ttft_s - fastest_s, limit.ttft_s / 2)
        return min((by_deadline, "deadline"), (by_slo, "slo"))
