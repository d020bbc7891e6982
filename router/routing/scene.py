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
    """

    __slots__ = ("_key", "_predictions", "costs", "facts", "partner", "partner_hosts")

    def __init__(
        self,
        facts: RequestFacts,
        costs: Costs,
        *,
        partner: InstanceView | None = None,
        partner_hosts: AbstractSet[str] = frozenset(),
    ) -> None:
        self.facts = facts
        self.costs = costs
        self.partner = partner
        self.partner_hosts = partner_hosts
        self._key: Sequence[InstanceView] | None = None
        self._predictions: list[Prediction] = []

    def predictions(self, candidates: Sequence[InstanceView]) -> list[Prediction]:
        """What the request would take on each candidate, asked for once; a decode worker reads the prompt itself."""
        if self._key is not candidates:
            self._key = candidates
            self._predictions = [self._predict(view) for view in candidates]
        return self._predictions

    def _predict(self, view: InstanceView) -> Prediction:
        cached = cached_tokens(view, self.facts)
        decode, prefill = (view, None) if self.partner is None else (self.partner, view)
        return self.costs.predict(decode, prefill, new_tokens=self.facts.prompt_tokens - cached, cached_tokens=cached)


def cached_tokens(view: InstanceView, facts: RequestFacts) -> int:
    """Prompt tokens that a worker probably holds. One is always computed, whatever is cached."""
    held = facts.prefix_blocks.get(view.instance_id, 0) * view.block_size
    return max(min(held, facts.prompt_tokens - 1), 0)


Scorer = Callable[[Sequence[InstanceView], Scene], list[float]]
