"""Predictions against what came: corrects the next ones by the last ones, and says how far off they are. Pure.

    first token after = overhead + gain * predicted        by way ("handover", "local") and by whether others work too

What no step tells is in these two: calls and queues between processes, and the cores that workers of one host lend to
each other, by which a prompt takes up to twice as long while the other pool is at work. Both are bounded, so that no
run of bad luck makes a way look impossible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from baton.router.costs.least_squares import LeastSquares

__all__ = ["MAX_GAIN", "OPTIONS", "Option", "Outcomes"]

Option = Literal["handover", "local"]
OPTIONS: tuple[Option, ...] = ("handover", "local")
_PRIOR = (1e-3, 1.0)
_SCALES = (3e-3, 0.1)
_STRENGTH = 10.0
MAX_GAIN = 3.0
"""A correction is by this factor at most, either way, but for the overhead."""
_MAX_OVERHEAD_S = 0.05
_OLD_AFTER = 64
"""Choices of other ways after which nobody knows any more what this one takes."""
_MEMORY = 0.05
_SHORTEST_S = 1e-9
"""No clock here tells less apart: what is shorter was not measured, and nothing can be held against it."""


@dataclass(slots=True)
class _Error:
    """Running relative errors of corrected predictions."""

    samples: int = 0
    signed: float = 0.0
    absolute: float = 0.0

    def note(self, predicted_s: float, taken_s: float) -> None:
        relative = min(taken_s / predicted_s - 1, 10.0)
        self.samples += 1
        share = max(_MEMORY, 1 / self.samples)
        self.signed += share * (relative - self.signed)
        self.absolute += share * (abs(relative) - self.absolute)


class Outcomes:
    """What became of predictions."""

    def __init__(self) -> None:
        self._fits = {
            (option, is_shared): LeastSquares(prior=_PRIOR, scales=_SCALES, strength=_STRENGTH)
            for option in OPTIONS
            for is_shared in (False, True)
        }
        self._errors = {option: _Error() for option in OPTIONS}
        self._since = dict.fromkeys(OPTIONS, 0)

    def correct(self, option: Option, ttft_s: float, *, is_shared: bool) -> float:
        """What a time of the laws is probably in truth.

        Args:
            is_shared: workers of the other pool are at work.
        """
        overhead_s, gain = self._fits[option, is_shared].coefficients
        return min(overhead_s, _MAX_OVERHEAD_S) + min(max(gain, 1 / MAX_GAIN), MAX_GAIN) * ttft_s

    def note(self, option: Option, law_s: float, taken_s: float, *, is_shared: bool) -> None:
        """A request took `taken_s` until its first token, where the laws had said `law_s`."""
        if taken_s < _SHORTEST_S or law_s < _SHORTEST_S:
            return
        self._errors[option].note(self.correct(option, law_s, is_shared=is_shared), taken_s)
        self._fits[option, is_shared].observe((1.0, law_s), taken_s)
        for other in OPTIONS:
            self._since[other] = 0 if other == option else self._since[other] + 1

    def is_old(self, option: Option) -> bool:
        """Whether nothing was heard of this way for many requests."""
        return self._since[option] >= _OLD_AFTER

    def error_ratio(self, option: Option) -> float:
        """Running mean of how much longer it took than predicted, relative to that; 0 before anything was heard."""
        return self._errors[option].signed

    def report(self) -> dict[str, Any]:
        """For people and JSON."""
        return {
            option: {
                "requests": self._errors[option].samples,
                "signed_relative_error": self._errors[option].signed,
                "mean_relative_error": self._errors[option].absolute,
                "requests_of_other_ways_since": self._since[option],
                "corrections": {
                    "others_idle" if not is_shared else "others_at_work": dict(
                        zip(("overhead_s", "gain"), self._fits[option, is_shared].coefficients, strict=True)
                    )
                    for is_shared in (False, True)
                },
            }
            for option in OPTIONS
        }
