"""How long answers turn out, as a part of what was asked for at most: pure, learnt per priority class.

Most clients ask for far more output than they get. Counting on the most would leave memory empty; counting on too
little has workers put running requests back. So a high quantile of the last answers is counted on, and each preemption
that a worker reports raises it for a while.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import deque

__all__ = ["OutputLengths"]

_SAMPLES = 256
_FEW = 16
"""Below so many answers, the most is counted on."""
_QUANTILE = 0.8
_RAISE = 0.2
_MAX_RAISE = 1.0
_DECAY = 0.98
"""Of the raise, with each answer that ends."""
_LEAST_AHEAD_TOKENS = 16
_AHEAD = 1.25
"""A request that has outlived what was expected is expected to go on for as long again times this less one."""


class OutputLengths:
    """Learns from answers that ended."""

    def __init__(self) -> None:
        self._by_class: dict[str, tuple[deque[float], list[float]]] = {}
        self._raise = 0.0

    def ended(self, class_name: str, *, written_tokens: int, max_tokens: int) -> None:
        """A choice of this class is over."""
        assert max_tokens > 0, max_tokens
        recent, ordered = self._by_class.setdefault(class_name, (deque(), []))
        share = min(written_tokens / max_tokens, 1.0)
        recent.append(share)
        insort(ordered, share)
        if len(recent) > _SAMPLES:
            del ordered[bisect_left(ordered, recent.popleft())]
        self._raise *= _DECAY

    def preempted(self, num: int = 1) -> None:
        """Workers had to put so many running requests back."""
        self._raise = min(self._raise + _RAISE * num, _MAX_RAISE)

    def ratio(self, class_name: str) -> float:
        """The part of `max_tokens` that is counted on, in (0, 1]."""
        _, ordered = self._by_class.get(class_name, (deque(), []))
        if len(ordered) < _FEW:
            return 1.0
        quantile = ordered[min(int(len(ordered) * _QUANTILE), len(ordered) - 1)]
        return min(max(quantile + self._raise, 0.01), 1.0)

    def expected(self, class_name: str, *, max_tokens: int, written_tokens: int = 0) -> int:
        """Output tokens that are counted on in all, of a choice that has `written_tokens` by now."""
        least = written_tokens * _AHEAD + _LEAST_AHEAD_TOKENS if written_tokens else 1
        return int(min(max(self.ratio(class_name) * max_tokens, least), max_tokens))
