"""What an engine step takes, fitted to what workers tell of theirs. Pure.

    t = a0 + a1 * prompt tokens + a2 * tokens that these attend to + b1 * decode rows + b2 * tokens that those attend to

    hand-made law  <- the cluster's fit  <- the role's fit  <- the instance's fit

Each leans on the one before where it has seen too little itself: a worker that came a moment ago is as fast as its
pool, and a decode worker that never read a prompt reads as the prefill workers do. A new incarnation begins as a new
worker, and its first steps, in which memory is touched and code is compiled for the first time, are not counted.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from baton.router.costs.least_squares import LeastSquares

__all__ = ["COLD_STEPS", "StepCost", "StepCosts", "StepShape", "attended_tokens"]

_PRIOR = (1.6e-3, 1e-4, 1e-8, 1e-4, 1e-8)
"""Seconds by feature. Their proportions matter: a step by itself costs about as much as 16 prompt tokens."""
_SCALES = (1.0, 256.0, 256.0 * 256.0, 8.0, 8.0 * 512.0)
_UNITS = ("s per step", "s per prompt token", "s per token attended to", "s per decode row", "s per context token")
_NAMES = ("step", "prefill_token", "prefill_attended_token", "decode_row", "decode_context_token")
_NEW_SAMPLES, _BATCH_SAMPLES = 64, 8
"""Solving takes longer than all else: once a worker is known, so many samples are taken at once."""
COLD_STEPS = 3
"""First steps of an incarnation that are not counted."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """What a step computes, as in `StepSample`."""

    prefill_tokens: int = 0
    attended_tokens: int = 0
    decode_rows: int = 0
    decode_context_tokens: int = 0

    @property
    def features(self) -> tuple[float, ...]:
        """In the order of the law."""
        return (
            1.0,
            float(self.prefill_tokens),
            float(self.attended_tokens),
            float(self.decode_rows),
            float(self.decode_context_tokens),
        )


def attended_tokens(new_tokens: int, cached_tokens: int) -> int:
    """What `new_tokens` behind `cached_tokens` attend to, each to itself too, in sum."""
    return new_tokens * cached_tokens + new_tokens * (new_tokens + 1) // 2


class StepCost:
    """One worker's law, or a pool's."""

    def __init__(self, parent: StepCost | None = None) -> None:
        self._parent = parent
        prior: Sequence[float] = parent.fit.coefficients if parent else _PRIOR
        self.fit: LeastSquares = LeastSquares(prior=prior, scales=_SCALES)

    def learn(self, samples: Sequence[tuple[StepShape, float]]) -> None:
        """Steps and what each took, in seconds; the parent has learned them before."""
        if self._parent is not None:
            self.fit.set_prior(self._parent.fit.coefficients)
        for shape, step_s in samples:
            self.fit.fold(shape.features, step_s)
        self.fit.solve()

    def step_s(self, shape: StepShape) -> float:
        """Of one step."""
        return self.fit.predict(shape.features)

    def work_s(self, steps: float, shape: StepShape) -> float:
        """Of so many steps that compute `shape` of prompts in sum, and its decode rows in each."""
        c = self.fit.coefficients
        per_step = c[0] + c[3] * shape.decode_rows + c[4] * shape.decode_context_tokens
        return steps * per_step + c[1] * shape.prefill_tokens + c[2] * shape.attended_tokens

    def report(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            "coefficients": dict(zip(_NAMES, self.fit.coefficients, strict=True)),
            "units": dict(zip(_NAMES, _UNITS, strict=True)),
            "samples": self.fit.samples,
            "relative_error": self.fit.error,
            "relative_bias": self.fit.bias,
        }


@dataclass(slots=True)
class _Known:
    incarnation: bytes
    cost: StepCost
    cold_left: int = COLD_STEPS
    waiting: list[tuple[StepShape, float]] = field(default_factory=list)


class StepCosts:
    """The laws of all workers that are there; `keep` forgets the others."""

    def __init__(self) -> None:
        self._cluster = StepCost()
        self._roles = {role: StepCost(self._cluster) for role in ("prefill", "decode")}
        self._instances: dict[str, _Known] = {}

    def learn(
        self, instance_id: str, incarnation: bytes, role: str, samples: Iterable[tuple[StepShape, float]]
    ) -> None:
        """Steps of one worker, oldest first."""
        known = self._instances.get(instance_id)
        if known is None or known.incarnation != incarnation:
            known = self._instances[instance_id] = _Known(incarnation, StepCost(self._roles[role]))
        told = list(samples)
        cold, known.cold_left = known.cold_left, max(0, known.cold_left - len(told))
        known.waiting += told[cold:]
        is_new = known.cost.fit.samples < _NEW_SAMPLES
        if known.waiting and (is_new or len(known.waiting) >= _BATCH_SAMPLES):
            warm, known.waiting = known.waiting, []
            for cost in (self._cluster, self._roles[role], known.cost):
                cost.learn(warm)

    def of(self, instance_id: str, role: str) -> StepCost:
        """A worker's law; its pool's where it has not told enough."""
        known = self._instances.get(instance_id)
        return known.cost if known is not None and known.cost.fit.samples else self._roles[role]

    def keep(self, instance_ids: Iterable[str]) -> None:
        """Forget all other workers."""
        kept = set(instance_ids)
        self._instances = {name: known for name, known in self._instances.items() if name in kept}

    def report(self) -> dict[str, Any]:
        """All laws."""
        return {
            "cluster": self._cluster.report(),
            "pools": {role: cost.report() for role, cost in self._roles.items()},
            "instances": {name: known.cost.report() for name, known in sorted(self._instances.items())},
        }
