"""What a scorer may look at besides the candidates: pure. One scene per choice of one half of a pair.

    scorer(candidates, scene) -> one score in [0, 1] each; 1 is best

A scorer sees all candidates at once, so that it may measure one against the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from baton.router.routing.costs import Costs, Prediction
from baton.router.routing.facts import InstanceView, RequestFacts

__all__ = ["Scene", "Scorer", "cached_tokens"]


class Scene:
    """One request, one role.

    Args:
        partner: the decode worker, where a prefill worker is chosen for it.
        partner_hosts: where workers of the other role are, while the partner is not chosen.
        beside: prefill workers, while a decode worker is chosen.
    """

    __slots__ = (
        "_cached",
        "_cached_of",
        "_predicted_of",
        "_predictions",
        "beside",
        "costs",
        "facts",
        "partner",
        "partner_hosts",
    )

    def __init__(
        self,
        facts: RequestFacts,
        costs: Costs,
        *,
        partner: InstanceView | None = None,
        partner_hosts: AbstractSet[str] = frozenset(),
        beside: Sequence[InstanceView] = (),
    ) -> None:
        self.facts = facts
        self.costs = costs
        self.partner = partner
        self.partner_hosts = partner_hosts
        self.beside = beside
        self._cached_of: Sequence[InstanceView] | None = None
        self._cached: list[int] = []
        self._predicted_of: Sequence[InstanceView] | None = None
        self._predictions: list[Prediction] = []

    def prediction_of(self, candidate: InstanceView) -> Prediction:
        """What the request would take on one of the candidates that `predictions` was asked for, or another one."""
        if self._predicted_of is not None:
            for view, prediction in zip(self._predicted_of, self._predictions, strict=True):
                if view is candidate:
                    return prediction
        return self._predict(candidate, cached_tokens(candidate, self.facts))

    def cached_tokens(self, candidates: Sequence[InstanceView]) -> list[int]:
        """Prompt tokens that each candidate probably holds, computed once."""
        if self._cached_of is not candidates:
            self._cached_of = candidates
            self._cached = [cached_tokens(view, self.facts) for view in candidates]
        return self._cached

    def predictions(self, candidates: Sequence[InstanceView]) -> list[Prediction]:
        """What the request would take on each candidate, asked for once; a decode worker reads the prompt itself."""
        if self._predicted_of is not candidates:
            self._predictions = [
                self._predict(view, cached)
                for view, cached in zip(candidates, self.cached_tokens(candidates), strict=True)
            ]
            self._predicted_of = candidates
        return self._predictions

    def _predict(self, view: InstanceView, cached: int) -> Prediction:
        decode, prefill = (view, None) if self.partner is None else (self.partner, view)
        new_tokens = self.facts.prompt_tokens - cached
        return self.costs.predict(decode, prefill, new_tokens=new_tokens, cached_tokens=cached, beside=self.beside)


def cached_tokens(view: InstanceView, facts: RequestFacts) -> int:
    """Prompt tokens that a worker probably holds. One is always computed, whatever is cached."""
    held = facts.prefix_blocks.get(view.instance_id, 0) * view.block_size
    return max(min(held, facts.prompt_tokens - 1), 0)


Scorer = Callable[[Sequence[InstanceView], Scene], list[float]]
