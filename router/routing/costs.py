"""What a routing decision asks of a cost model, see `router/costs/`. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

from baton.router.routing.facts import InstanceView

__all__ = ["Costs", "Prediction"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """What serving a request in one way would take.

    Attributes:
        ttft_s: until its first token, all queues ahead of it included.
        tpot_s: between its tokens after that.
        imposed_s: by how much it holds running requests up while its prompt is computed, summed over them.
        parts: what `ttft_s` consists of, in seconds, by phase: "admission", "queue", "prefill", "transfer", "step",
            "borrowed" (for cores that a busy worker does not lend), "correction" (for what earlier predictions were
            off by).
        is_old: nothing was heard of this way for long.
        is_shared: workers of the other pool are at work, which may be felt.
    """

    ttft_s: float
    tpot_s: float
    imposed_s: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    is_old: bool = False
    is_shared: bool = False


class Costs(Protocol):
    """Predicts."""

    def predict(
        self,
        decode: InstanceView,
        prefill: InstanceView | None,
        *,
        new_tokens: int,
        cached_tokens: int,
        beside: Sequence[InstanceView] = (),
    ) -> Prediction:
        """What a prompt would take on this pair; `prefill` None: the decode worker computes it.

        Args:
            beside: prefill workers, which may be busy on cores that the decode worker would else borrow.
            new_tokens: prompt tokens that whoever computes the prompt has to compute.
            cached_tokens: those that it holds already.
        """
        ...
