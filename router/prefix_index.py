"""Which decode worker probably holds which prefix: pure. Learned from this router's own dispatches, never exact.

A wrong guess costs time, not correctness: the worker's own cache decides what is really reused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Sequence

__all__ = ["PrefixIndex"]

_MAX_HOLDERS = 4


class PrefixIndex:
    """Block name -> the instances that last computed it, least recently used entries dropped first.

    Args:
        max_blocks: entries kept.
    """

    def __init__(self, max_blocks: int = 100_000) -> None:
        assert max_blocks > 0, max_blocks
        self._max_blocks = max_blocks
        self._holders: OrderedDict[bytes, tuple[str, ...]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._holders)

    def insert(self, names: Iterable[bytes], instance_id: str) -> None:
        """`instance_id` computes these blocks. Later blocks are dropped before their parents."""
        for name in reversed(list(names)):
            holders = self._holders.get(name, ())
            kept = tuple(holder for holder in holders if holder != instance_id)[: _MAX_HOLDERS - 1]
            self._holders[name] = (instance_id, *kept)
            self._holders.move_to_end(name)
        while len(self._holders) > self._max_blocks:
            self._holders.popitem(last=False)

    def match(self, names: Sequence[bytes]) -> dict[str, int]:
        """Instance -> number of leading blocks of `names` it probably holds; instances with none are absent."""
        matched: dict[str, int] = {}
        alive: set[str] | None = None
        for depth, name in enumerate(names, start=1):
            holders = self._holders.get(name, ())
            alive = set(holders) if alive is None else alive.intersection(holders)
            if not alive:
                break
            for holder in alive:
                matched[holder] = depth
        return matched

    def forget(self, instance_id: str) -> None:
        """The instance is gone, and its cache with it."""
        for name, holders in list(self._holders.items()):
            if instance_id in holders:
                kept = tuple(holder for holder in holders if holder != instance_id)
                if kept:
                    self._holders[name] = kept
                else:
                    del self._holders[name]
