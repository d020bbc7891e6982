"""One half of a choice: filter -> score -> pick. Prefill and decode are two profiles of this one mechanism. Pure.

views of the role --filters--> candidates --scorers in [0, 1], weighted--> sums --picker--> the one taken
         \\--dropped, and why                                                        everything told: `Ranking`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import mul

from baton.router.routing.facts import InstanceView
from baton.router.routing.filters import FILTERS, Filter, apply_filters
from baton.router.routing.picker import Picker
from baton.router.routing.scene import Scene, Scorer

__all__ = ["Profile", "Ranking", "WeightedScorer"]


@dataclass(frozen=True, slots=True)
class WeightedScorer:
    """A scorer, by the name of its weight in `routing.weights`."""

    name: str
    score: Scorer
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranking:
    """What came of all views of a role.

    Attributes:
        candidates: those that no filter dropped.
        scorers: which scored them.
        columns: the scores of each scorer, one for each candidate.
        totals: weighted sums, one for each candidate.
        index: of the candidate that was taken; None: there was none.
        dropped: instance id -> "filter: why".
    """

    candidates: tuple[InstanceView, ...]
    scorers: tuple[WeightedScorer, ...]
    columns: tuple[tuple[float, ...], ...]
    totals: tuple[float, ...]
    index: int | None
    dropped: Mapping[str, str]

    @property
    def chosen(self) -> InstanceView | None:
        """Who was taken."""
        return None if self.index is None else self.candidates[self.index]

    def scores_of(self, index: int) -> dict[str, float]:
        """A candidate's scores by name."""
        return {scorer.name: column[index] for scorer, column in zip(self.scorers, self.columns, strict=True)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Profile:
    """How a worker of one role is chosen."""

    role: str
    scorers: tuple[WeightedScorer, ...]
    picker: Picker
    filters: tuple[Filter, ...] = FILTERS

    def run(self, views: Sequence[InstanceView], scene: Scene) -> Ranking:
        """The ranking of those of `views` that have this role; nobody is chosen where filters leave none."""
        candidates, dropped = apply_filters(
            [view for view in views if view.role == self.role], scene.facts, self.filters
        )
        if not candidates:
            return Ranking(
                candidates=(),
                scorers=self.scorers,
                columns=((),) * len(self.scorers),
                totals=(),
                index=None,
                dropped=dropped,
            )
        columns = [scorer.score(candidates, scene) for scorer in self.scorers]
        weights = [scorer.weight for scorer in self.scorers]
        # One row per candidate; without scorers there are no rows to sum.
        totals = [sum(map(mul, weights, row)) for row in zip(*columns, strict=True)] or [0.0] * len(candidates)
        return Ranking(
            candidates=tuple(candidates),
            scorers=self.scorers,
            columns=tuple(map(tuple, columns)),
            totals=tuple(totals),
            index=self.picker(candidates, totals, scene.facts),
            dropped=dropped,
        )
