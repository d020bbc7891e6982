"""A tenant's token rate as a bucket: pure. Charged for what a request may take at most, paid back what it did not.

    level   rises by `tokens_per_s` up to `burst_tokens`; below zero is a debt, paid before anything else is let in

A request larger than the burst is let in by a full bucket, and leaves it in debt.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["RateLimit", "TokenBucket"]


@dataclass(frozen=True, slots=True, kw_only=True)
class RateLimit:
    """Prompt and output tokens that a tenant may use."""

    tokens_per_s: float
    burst_tokens: float

    def __post_init__(self) -> None:
        assert self.tokens_per_s > 0, self
        assert self.burst_tokens > 0, self

    def over(self, share: float) -> RateLimit:
        """This one's part where `1 / share` routers each hold a part."""
        return RateLimit(tokens_per_s=self.tokens_per_s * share, burst_tokens=self.burst_tokens * share)


class TokenBucket:
    """Full at the start.

    Attributes:
        limit: may be changed at any time.
    """

    def __init__(self, limit: RateLimit, *, now_s: float) -> None:
        self.limit = limit
        self._level = limit.burst_tokens
        self._at_s = now_s

    def level(self, now_s: float) -> float:
        """Tokens that it holds; negative: a debt."""
        self._level = min(self._level + max(now_s - self._at_s, 0.0) * self.limit.tokens_per_s, self.limit.burst_tokens)
        self._at_s = max(now_s, self._at_s)
        return self._level

    def wait_s(self, tokens: float, now_s: float) -> float:
        """How long until so many may be taken, if nothing else is; 0: now."""
        missing = min(tokens, self.limit.burst_tokens) - self.level(now_s)
        # Rounding must not make the last crumb be waited for.
        return 0.0 if missing <= 1e-6 * self.limit.burst_tokens else missing / self.limit.tokens_per_s

    def take(self, tokens: float, now_s: float) -> float:
        """Takes them and returns 0, or takes nothing and returns how long to wait in seconds."""
        assert tokens >= 0, tokens
        wait_s = self.wait_s(tokens, now_s)
        if wait_s == 0.0:
            self._level -= tokens
        assert math.isfinite(wait_s)
        return wait_s

    def refund(self, tokens: float, now_s: float) -> None:
        """Give back what was taken and not used."""
        assert tokens >= 0, tokens
        self._level = min(self.level(now_s) + tokens, self.limit.burst_tokens)

    def is_full(self, now_s: float) -> bool:
        """Whether nothing need be remembered of it."""
        return self.level(now_s) >= self.limit.burst_tokens
