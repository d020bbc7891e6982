"""What has changed among a pool's named blocks since somebody last asked: pure, one set operation per change.

    pool names or evicts a block  -> toggle()         the second change of one name undoes the first
    pool forgets all              -> clear()
    now and then                  -> take()           the net change, and begin anew

A block is told by its key, the first eight bytes of its name as a number. Two names may share one; whoever believes a
key then only takes a little longer. The journal cannot outgrow the pool: a name in it is either in the pool now or was
there at the last `take`.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

__all__ = ["BlockChange", "BlockJournal", "block_keys"]

_KEY_BYTES = 8


def block_keys(names: Sequence[bytes]) -> list[int]:
    """The keys of blocks, from their names (see `prefix_cache.py`)."""
    return list(struct.unpack(f">{len(names)}Q", b"".join([name[:_KEY_BYTES] for name in names])))


@dataclass(frozen=True, slots=True)
class BlockChange:
    """Keys of the blocks that came and went; `cleared`: all that were there had gone before."""

    stored: list[int]
    removed: list[int]
    cleared: bool = False

    def __bool__(self) -> bool:
        return bool(self.stored or self.removed or self.cleared)

    def apply(self, held: set[int]) -> None:
        """Bring a set of keys up to date."""
        if self.cleared:
            held.clear()
        held.difference_update(self.removed)
        held.update(self.stored)


class BlockJournal:
    """The net change since the last `take`. Of one thread, but anyone may ask whether it is empty."""

    __slots__ = ("_changed", "_is_cleared")

    def __init__(self) -> None:
        self._changed: dict[bytes, bool] = {}  # name -> whether it is there now
        self._is_cleared = False

    def __bool__(self) -> bool:
        return self._is_cleared or bool(self._changed)

    def toggle(self, name: bytes, is_stored: bool) -> None:
        """A block came to be found by `name`, or no longer is: in turns, for each name."""
        if self._changed.pop(name, None) is None:
            self._changed[name] = is_stored

    def clear(self) -> None:
        """No block has a name any more."""
        self._changed.clear()
        self._is_cleared = True

    def take(self) -> BlockChange:
        """What has changed since the last time."""
        changed, self._changed = self._changed, {}
        is_cleared, self._is_cleared = self._is_cleared, False
        return BlockChange(
            block_keys([name for name, is_stored in changed.items() if is_stored]),
            block_keys([name for name, is_stored in changed.items() if not is_stored]),
            is_cleared,
        )
