"""A token bucket: when a link of a given rate would have delivered what is booked on it. Pure."""

from __future__ import annotations

import threading

__all__ = ["RateLimiter"]


class RateLimiter:
    """Bookings are served in the order in which they come; thread-safe.

    Args:
        bytes_per_s: rate.
        burst_bytes: what an idle link delivers at once.
    """

    def __init__(self, bytes_per_s: float, *, burst_bytes: int = 0) -> None:
        assert bytes_per_s > 0, f"a link needs a rate above zero, not {bytes_per_s}"
        self._bytes_per_s = bytes_per_s
        self._burst_s = burst_bytes / bytes_per_s
        self._free_s = float("-inf")
        self._lock = threading.Lock()

    def book(self, num_bytes: int, now_s: float) -> float:
        """Book `num_bytes` and return the time at which the last of them has come."""
        with self._lock:
            self._free_s = max(self._free_s, now_s - self._burst_s) + num_bytes / self._bytes_per_s
            return self._free_s
