"""How slow a worker is lately, over its own best: pure. Time is an argument.

    slowness.observe(rows=8, new_tokens=8, context_tokens=900, step_s=0.011, now_s=...)     now and then, after a step
    slowness.at(now_s)                                                  1: as ever; 10: ten times; 0: not known

Which steps are counted in must not depend on how long they take. Steps are compared with steps of their shape only:
rows, prompt tokens and context within an octave each, so that within one shape the cost differs by less than two. What
a shape costs at its best is learned, from above fast and from below slowly: one lucky step moves it half of the way,
and every slower one up by a thousandth, so that a machine that became slower for good is not called slow for ever. The
answer is the median over the last steps that can be judged: single stragglers (a page fault, a neighbour's burst) do
not count.
"""

from __future__ import annotations

import statistics
from collections import deque
from dataclasses import dataclass

__all__ = ["Slowness"]

_WINDOW_S = 10.0
_WINDOW_STEPS = 15
_LEAST_STEPS = 5
"""So many judged steps in the window, and so many steps of a shape before it judges one."""
_LEARN_DOWN, _DRIFT_UP = 0.5, 1.001
_MAX_SHAPES = 1024

_Shape = tuple[int, int, int]


@dataclass(slots=True)
class _Best:
    step_s: float
    count: int = 1


class Slowness:
    """One worker's steps."""

    def __init__(self) -> None:
        self._best: dict[_Shape, _Best] = {}
        self._recent: deque[tuple[float, float]] = deque(maxlen=_WINDOW_STEPS)  # (when, times the best)

    def observe(self, *, rows: int, new_tokens: int, context_tokens: int, step_s: float, now_s: float) -> None:
        """Counts one step in.

        Args:
            rows: requests in it.
            new_tokens: tokens computed, one for each row that writes, more for prompts.
            context_tokens: tokens attended to, over all rows.
        """
        if step_s <= 0:
            return
        shape = _grade(rows), _grade(new_tokens - rows), _grade(context_tokens)
        best = self._best.get(shape)
        if best is None:
            if len(self._best) >= _MAX_SHAPES:
                del self._best[next(iter(self._best))]
            self._best[shape] = _Best(step_s)
            return
        if best.count >= _LEAST_STEPS:
            self._recent.append((now_s, step_s / best.step_s))
        best.count += 1
        if step_s < best.step_s:
            best.step_s += _LEARN_DOWN * (step_s - best.step_s)
        else:
            best.step_s = min(best.step_s * _DRIFT_UP, step_s)

    def at(self, now_s: float) -> float:
        """How many times longer steps take lately than at their best, at least 1; 0 where too few were judged."""
        times = [times for when_s, times in self._recent if now_s - when_s <= _WINDOW_S]
        return max(1.0, statistics.median(times)) if len(times) >= _LEAST_STEPS else 0.0


def _grade(count: int) -> int:
    return count.bit_length()
