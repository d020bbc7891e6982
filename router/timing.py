"""Where the time until the first token went: the router's own parts, the workers' phases, and what is left. Pure.

    ttft = queue + route + reserve + prefill_queue + prefill + transfer + attach + other

`other` is what nobody's clock has seen: the way of messages between processes, their event loops, and attempts that
broke before. `first_step` follows the first token: until the second one was sampled.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from baton.engine.request import Phases

__all__ = ["PHASES", "Timing"]

PHASES = (
    "queue", "route", "reserve", "prefill_queue", "prefill", "transfer", "attach", "other", "first_step"
)  # fmt: skip
"""In the order in which they follow one another, as metrics and timelines name them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One choice's time until its first token, in seconds.

    Attributes:
        queue_s: in this router's admission.
        route_s: choosing workers, all attempts until the first token together.
        ttft_s: from arrival to the first token.
        phases: of the attempt that gave the first token.
    """

    queue_s: float
    route_s: float
    ttft_s: float
    phases: Phases = field(default_factory=Phases)

    @property
    def other_s(self) -> float:
        """What no phase holds."""
        return max(self.ttft_s - self.queue_s - self.route_s - self.phases.until_first_token_s, 0.0)

    def with_second_token(self, phases: Phases) -> Timing:
        """With what was told with the second token."""
        return replace(self, phases=replace(self.phases, first_step_s=phases.first_step_s))

    def by_phase(self) -> dict[str, float]:
        """Seconds of each of `PHASES`."""
        phases = self.phases
        seconds = (
            self.queue_s,
            self.route_s,
            phases.reserve_s,
            phases.prefill_queue_s,
            phases.prefill_s,
            phases.transfer_exposed_s,
            phases.attach_s,
            self.other_s,
            phases.first_step_s,
        )
        return dict(zip(PHASES, seconds, strict=True))

    def as_dict(self) -> dict[str, Any]:
        """What `usage.baton.timing` says, named as `Timing` in `inference.proto`."""
        phases = self.phases
        return {
            "queue_s": round(self.queue_s, 6),
            "route_s": round(self.route_s, 6),
            "reserve_s": round(phases.reserve_s, 6),
            "prefill_queue_s": round(phases.prefill_queue_s, 6),
            "prefill_s": round(phases.prefill_s, 6),
            "transfer_exposed_s": round(phases.transfer_exposed_s, 6),
            "attach_s": round(phases.attach_s, 6),
            "other_s": round(self.other_s, 6),
            "first_step_s": round(phases.first_step_s, 6),
            "ttft_s": round(self.ttft_s, 6),
        }
