"""Fits a non-negative linear law to a stream of samples that it forgets slowly. Pure.

    fit = LeastSquares(prior=(5e-3, 1e-4), scales=(1.0, 256.0))
    fit.observe((1.0, 256.0), 0.031)          every sample; or `fold` of each, and one `solve` for a batch
    fit.predict((1.0, 512.0))                 never negative
    fit.error                                 mean relative error of predictions made before each sample was folded in

What is minimised over c >= 0, by the active set method of Lawson and Hanson on the normal equations:

    sum of weight * (y - c.x)^2  +  strength * sum of (c_i / prior_i - 1)^2

Weights make errors relative: a step of 2 ms counts as much as one of 500 ms. The prior decides what samples do not: as
long as nothing was seen of a feature, its coefficient is the prior's. It is never forgotten, so that features that
never change (the constant beside a batch that is always of one size) do no harm.

Samples are forgotten only in the directions that newer ones speak of: the weight of features i and j is lessened by
the root of both their factors, `forgetting` for what the sample has and 1 for what it has not, and the right-hand side
so that the solution stays where it is. A minute of decode steps does not wash out what prompts cost.

A sample far from what is expected is taken as one at the limit, which widens as errors grow, and where several in a row
are off to one side what came before is forgotten fast: a stray pause moves the fit little, a worker that became three
times slower is believed within some samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import log, sqrt

__all__ = ["LeastSquares"]

_FORGETTING = 0.98
_STRENGTH = 0.01
_ERROR_MEMORY = 0.05
"""Share of the newest sample in the running errors."""
_WORST_ERROR = 10.0
_LIMIT_AT_LEAST, _LIMIT_ERRORS = 1.0, 4.0
_DRIFT_MEMORY, _DRIFTS_AT, _FORGETTING_IN_DRIFT = 0.1, 0.35, 0.8
"""Share of the newest sample in the drift, which is in [-1, 1], where the law has changed, and what is done then."""
_TRUSTED_SAMPLES = 8
"""From so many on, a sample can be called strange."""
_LEAST_PRIOR = 0.1
"""How far off a coefficient may well be, at least: what it adds at its scale, as a share of the whole prior."""
_KNOWN_SAMPLES, _SOLVE_EVERY = 64, 8
"""Solving takes longer than all else: once the law is known, `observe` does so every so many samples."""
_MOST_FORGOTTEN = 64
"""Samples' worth at once: of a large batch something stays."""
_SINGULAR = 1e-12
_LEAST, _MOST = 1e-9, 1e15
"""Bounds of values and features, beyond which arithmetic would fail before any law did."""


class LeastSquares:
    """One law: y is about c.x.

    Args:
        prior: coefficients before there are samples, not negative.
        scales: of each feature, what is a usual value, positive.
        forgetting: factor of older samples' weight with each new one.
        strength: how many samples the prior weighs.

    Attributes:
        samples: how many were counted in.
        error: running mean of |relative error|, 0 before there are samples.
        bias: running mean of the relative error; positive: it took longer than predicted.
    """

    def __init__(
        self,
        *,
        prior: Sequence[float],
        scales: Sequence[float],
        forgetting: float = _FORGETTING,
        strength: float = _STRENGTH,
    ) -> None:
        assert len(prior) == len(scales)
        assert 0 < forgetting <= 1
        assert strength > 0
        size = len(prior)
        self.samples = 0
        self.error = 0.0
        self.bias = 0.0
        self._drift = 0.0
        self._solved = 0
        self._seen = [0] * size
        self._forgetting = forgetting
        self._strength = strength
        self._scales = tuple(scales)
        self._prior = list(prior)
        self._solution = list(prior)
        self._matrix = [[0.0] * size for _ in range(size)]
        self._vector = [0.0] * size

    @property
    def coefficients(self) -> tuple[float, ...]:
        """As last solved."""
        return tuple(self._solution)

    def predict(self, features: Sequence[float]) -> float:
        """What the law says."""
        return sum([c * x for c, x in zip(self._solution, features, strict=True)])

    def set_prior(self, prior: Sequence[float]) -> None:
        """Another law to fall back on; takes effect with the next `solve`."""
        self._prior = list(prior)

    def observe(self, features: Sequence[float], value: float) -> None:
        """One sample; felt at once while the law is new, and soon later on."""
        self.fold(features, value)
        if self.samples <= _KNOWN_SAMPLES or self.samples - self._solved >= _SOLVE_EVERY:
            self.solve()

    def fold(self, features: Sequence[float], value: float) -> None:
        """Counts a sample in; `solve` makes it felt. What cannot be true is passed over."""
        if not (_LEAST <= value <= _MOST and min(features) >= 0 and 0 < max(features) <= _MOST):
            return
        expected = self.predict(features)
        if expected > 0:
            value = self._judge(value, expected)
        weight = 1 / (value * max(expected, value * 1e-3))
        size = range(len(features))
        for i in size:
            if features[i]:
                self._seen[i] += 1
                scaled, row = weight * features[i], self._matrix[i]
                self._vector[i] += scaled * value
                for j in size:
                    row[j] += scaled * features[j]
        self.samples += 1

    def _judge(self, value: float, expected: float) -> float:
        """Notes the error, and returns the value, or the limit of what is believed."""
        relative = value / expected - 1
        share = max(_ERROR_MEMORY, 1 / (self.samples + 1))
        limit = 1 + max(_LIMIT_AT_LEAST, _LIMIT_ERRORS * self.error)
        # An error down counts as much as the same factor up.
        size = max(value / expected, expected / value) - 1
        self.error += share * (min(size, _WORST_ERROR) - self.error)
        self.bias += share * (min(relative, _WORST_ERROR) - self.bias)
        if self._solved < _TRUSTED_SAMPLES:
            return value
        self._drift += _DRIFT_MEMORY * (min(max(log(value / expected), -1.0), 1.0) - self._drift)
        return min(max(value, expected / limit), expected * limit)

    def solve(self) -> None:
        """Makes what was folded in felt."""
        self._solved = self.samples
        scales, size = self._scales, range(len(self._scales))
        whole = sum([p * s for p, s in zip(self._prior, scales, strict=True)]) or 1.0
        matrix = [[self._matrix[i][j] / (scales[i] * scales[j]) for j in size] for i in size]
        vector = [self._vector[i] / scales[i] for i in size]
        for i in size:
            # In units of what the feature adds at its scale; a prior that was far too small is not clung to.
            prior, present = self._prior[i] * scales[i], self._solution[i] * scales[i]
            weight = self._strength / max(prior, present, _LEAST_PRIOR * whole) ** 2
            matrix[i][i] += weight
            vector[i] += weight * prior
        self._solution = [c / s for c, s in zip(_solve_non_negative(matrix, vector), scales, strict=True)]
        self._forget()

    def _forget(self) -> None:
        """Lessens the weight of what was folded in, by as many samples as there were since the last time."""
        forgetting = self._forgetting if abs(self._drift) < _DRIFTS_AT else min(_FORGETTING_IN_DRIFT, self._forgetting)
        seen, self._seen = self._seen, [0] * len(self._seen)
        if forgetting == 1:
            return
        size = range(len(seen))
        # Where the present solution leaves a rest, the rest is kept: see the module's text.
        rest = [
            self._vector[i] - sum([a * c for a, c in zip(self._matrix[i], self._solution, strict=True)]) for i in size
        ]
        factors = [sqrt(forgetting) ** min(count, _MOST_FORGOTTEN) for count in seen]
        for i in size:
            row = self._matrix[i]
            for j in size:
                row[j] *= factors[i] * factors[j]
            self._vector[i] = factors[i] * rest[i] + sum([a * c for a, c in zip(row, self._solution, strict=True)])


def _solve_non_negative(matrix: Sequence[Sequence[float]], vector: Sequence[float]) -> list[float]:
    """The c >= 0 with the least c.A.c / 2 - b.c, of a positive definite A: Lawson and Hanson."""
    size = len(vector)
    found, free = [0.0] * size, set[int]()
    for _ in range(3 * size):
        slopes = [vector[i] - sum([a * c for a, c in zip(matrix[i], found, strict=True)]) for i in range(size)]
        best = max((i for i in range(size) if i not in free), key=lambda i: slopes[i] / sqrt(matrix[i][i]), default=-1)
        if best < 0 or slopes[best] <= 1e-9 * abs(vector[best]):
            break
        free.add(best)
        while True:
            order = sorted(free)
            wanted = dict(zip(order, _solve(matrix, vector, order), strict=True))
            # As far towards it as nothing becomes negative; what becomes 0 on the way is bound there.
            steps = {i: found[i] / (found[i] - wanted[i]) if found[i] > 0 else 0.0 for i in order if wanted[i] <= 0}
            if not steps:
                found = [wanted.get(i, 0.0) for i in range(size)]
                break
            step = min(steps.values())
            free -= {i for i in steps if steps[i] <= step}
            found = [found[i] + step * (wanted[i] - found[i]) if i in free else 0.0 for i in range(size)]
            if not free:
                break
    return found


def _solve(matrix: Sequence[Sequence[float]], vector: Sequence[float], order: Sequence[int]) -> list[float]:
    """Of the equations and unknowns in `order`: Gauss, with the rows scaled by their diagonals."""
    size = len(order)
    scale = [1 / sqrt(matrix[i][i]) for i in order]
    rows = [
        [matrix[i][j] * scale[a] * scale[b] for b, j in enumerate(order)] + [vector[i] * scale[a]]
        for a, i in enumerate(order)
    ]
    for a in range(size):
        pivot = rows[a][a]
        if pivot <= _SINGULAR:
            # This one is as good as a mixture of those before: leave it to them.
            rows[a] = [float(b == a) for b in range(size)] + [0.0]
            continue
        for b in range(a + 1, size):
            factor = rows[b][a] / pivot
            if factor:
                rows[b] = [x - factor * y for x, y in zip(rows[b], rows[a], strict=True)]
    found = [0.0] * size
    for a in reversed(range(size)):
        rest = rows[a][size] - sum([rows[a][b] * found[b] for b in range(a + 1, size)])
        found[a] = rest / rows[a][a]
    return [x * s for x, s in zip(found, scale, strict=True)]
