"""How fast what waits is taken, and quantiles of what was seen lately: pure."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

__all__ = ["Pace", "Recent"]

_GRANTS = 64
_FEW_GRANTS = 8
_VALUES = 128
_FEW_VALUES = 8


class Pace:
    """Tokens of work per second that leave a queue, over the last grants made while something waited."""

    def __init__(self) -> None:
        self._grants: deque[tuple[float, float]] = deque(maxlen=_GRANTS)
        self._since_s: float | None = None

    def began_to_wait(self, now_s: float) -> None:
        """The queue is not empty any more."""
        self._since_s = now_s

    def granted(self, cost: float, now_s: float, *, is_last: bool) -> None:
        """An entry was taken; `is_last`: nothing waits any more."""
        if self._since_s is not None:
            self._grants.append((max(now_s - self._since_s, 0.0), cost))
        self._since_s = None if is_last else now_s

    def left(self) -> None:
        """Nothing waits any more, though nothing was taken."""
        self._since_s = None

    def wait_s(self, tokens: float, now_s: float) -> float | None:
        """How long until so much work is taken; None: not known yet."""
        if len(self._grants) < _FEW_GRANTS:
            return None
        # A standstill counts as it lasts.
        open_s = max(now_s - self._since_s, 0.0) if self._since_s is not None else 0.0
        taken = sum(cost for _, cost in self._grants)
        spent_s = max(sum(span_s for span_s, _ in self._grants), open_s)
        return tokens * spent_s / taken


class Recent:
    """The last values of something, in order of size."""

    def __init__(self) -> None:
        self._recent: deque[float] = deque()
        self._ordered: list[float] = []

    def add(self, value: float) -> None:
        """Another one."""
        self._recent.append(value)
        insort(self._ordered, value)
        if len(self._recent) > _VALUES:
            del self._ordered[bisect_left(self._ordered, self._recent.popleft())]

    def quantile(self, share: float) -> float | None:
        """None: too few have been seen."""
        if len(self._ordered) < _FEW_VALUES:
            return None
        return self._ordered[min(int(share * len(self._ordered)), len(self._ordered) - 1)]
