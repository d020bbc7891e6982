"""Which blocks workers will soon hold because of requests on their way there: pure, time is an argument.

    add(bit, keys) --> young --every `ttl_s`--> old --> gone

Two generations, so that forgetting costs nothing: what is added stays for one to two times `ttl_s`, unless an event
confirms it sooner. A worker is one bit of a mask.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Predictions"]

_TTL_S = 4.0
_MAX_KEYS = 200_000


class Predictions:
    """Key -> mask of the workers that will hold the block.

    Args:
        max_keys: in each generation; a full one ends early.

    Attributes:
        generation: counts up.
        young, old: the two; for reading.
    """

    __slots__ = ("_ends_s", "_max_keys", "_ttl_s", "generation", "old", "young")

    def __init__(self, *, ttl_s: float = _TTL_S, max_keys: int = _MAX_KEYS) -> None:
        assert ttl_s > 0
        assert max_keys > 0
        self._ttl_s = ttl_s
        self._max_keys = max_keys
        self._ends_s: float | None = None
        self.generation = 0
        self.young: dict[int, int] = {}
        self.old: dict[int, int] = {}

    def add(self, bit: int, keys: Iterable[int], now_s: float) -> None:
        """The worker will hold these blocks."""
        self.expire(now_s)
        young = self.young
        for key in keys:
            young[key] = young.get(key, 0) | bit
            if len(young) > self._max_keys:
                self._turn(now_s)
                young = self.young

    def confirm(self, bit: int, key: int) -> None:
        """It holds it: no longer a prediction."""
        for generation in (self.young, self.old):
            mask = generation.get(key)
            if mask is not None:
                generation[key] = mask & ~bit

    def expire(self, now_s: float) -> None:
        """Drop what is too old."""
        if self._ends_s is None:
            self._ends_s = now_s + self._ttl_s
        if now_s < self._ends_s:
            return
        is_long_ago = now_s >= self._ends_s + self._ttl_s
        self._turn(now_s)
        if is_long_ago:
            self._turn(now_s)

    def _turn(self, now_s: float) -> None:
        self.old, self.young = self.young, {}
        self._ends_s = now_s + self._ttl_s
        self.generation += 1
