"""Who is let in: pure. Bounds requests and tokens that are accepted and not ended; refuses the rest at once.

Refusals carry an honest hint: how long until enough of what is accepted has ended, at the pace of the last completions.
"""

from __future__ import annotations

from collections import deque

from baton.errors import OverloadedError

__all__ = ["Admission"]

_PACE_SAMPLES = 64
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class Admission:
    """Counts what is accepted.

    Args:
        max_requests: choices accepted and not ended.
        max_tokens: their prompt plus maximal output tokens. A single request larger than this is let in when alone.

    Attributes:
        num_requests, num_tokens: accepted and not ended.
    """

    def __init__(self, *, max_requests: int, max_tokens: int) -> None:
        assert max_requests > 0, max_requests
        assert max_tokens > 0, max_tokens
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._ended: deque[tuple[float, int, int]] = deque(maxlen=_PACE_SAMPLES)
        self.num_requests = 0
        self.num_tokens = 0

    def admit(self, *, num_requests: int, num_tokens: int, now_s: float) -> None:
        """Accept `num_requests` choices with `num_tokens` tokens in all; `release` them when they end.

        Raises:
            OverloadedError: one of the bounds would be passed; carries `retry_after_s`.
        """
        over_requests = self.num_requests + num_requests - self._max_requests
        over_tokens = self.num_tokens + num_tokens - self._max_tokens
        if self.num_requests == 0 and num_requests <= self._max_requests:
            over_tokens = 0
        if over_requests > 0 or over_tokens > 0:
            retry_s = self._retry_after_s(over_requests, over_tokens, now_s)
            raise OverloadedError(
                f"the server is full: {self.num_requests} requests with {self.num_tokens} tokens are in work"
                f" (router.max_queued_requests={self._max_requests}, router.max_queued_tokens={self._max_tokens});"
                f" retry after {retry_s:.0f} s",
                retry_after_s=retry_s,
            )
        self.num_requests += num_requests
        self.num_tokens += num_tokens

    def release(self, *, num_requests: int, num_tokens: int, now_s: float) -> None:
        """What was admitted has ended."""
        self.num_requests -= num_requests
        self.num_tokens -= num_tokens
        assert self.num_requests >= 0, "released more requests than admitted"
        assert self.num_tokens >= 0, "released more tokens than admitted"
        self._ended.append((now_s, num_requests, num_tokens))

    def _retry_after_s(self, over_requests: int, over_tokens: int, now_s: float) -> float:
        if not self._ended:
            return _MIN_RETRY_S
        span_s = max(now_s - self._ended[0][0], 1e-3)
        ended_requests = sum(requests for _, requests, _ in self._ended)
        ended_tokens = sum(tokens for _, _, tokens in self._ended)
        wait_s = max(
            max(over_requests, 0) * span_s / max(ended_requests, 1), max(over_tokens, 0) * span_s / max(ended_tokens, 1)
        )
        return float(min(max(wait_s, _MIN_RETRY_S), _MAX_RETRY_S))
