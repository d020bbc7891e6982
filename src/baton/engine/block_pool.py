"""Who owns which KV block: pure bookkeeping over block ids, torch-free.

Every block is in exactly one state, and `free + cached + owned == total` after every call:

    free  --allocate-->  owned (references >= 1)  --last release, unnamed-->  free
                          |                 ^
                          | last release,   | acquire (prefix hit)
                          v named           |
                        cached  ------------+        cached --allocate evicts the least recently used--> owned

Ownership: a caller owns a reference from `allocate` or `acquire` until it gives it back by `release`; nobody writes
into a block with more than one reference (`writable`), so a shared partial block is copied first.

Every name that comes or goes is noted in `journal`, for those who want to know which prefixes are here.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from baton.engine.block_journal import BlockJournal

__all__ = ["BlockCounts", "BlockPool"]


@dataclass(frozen=True, slots=True)
class BlockCounts:
    """Number of blocks by state; they sum to `total`."""

    total: int
    free: int
    cached: int
    owned: int


class BlockPool:
    """Reference-counted blocks with a least-recently-used cache of named, unowned ones."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        assert num_blocks > 0
        assert block_size > 0
        self.num_blocks = num_blocks
        self.block_size = block_size
        self._free: deque[int] = deque(range(num_blocks))
        self._cached: OrderedDict[int, None] = OrderedDict()  # least recently used first
        self._references = [0] * num_blocks
        self._name_of: dict[int, bytes] = {}
        self._block_of: dict[bytes, int] = {}
        self.journal = BlockJournal()

    @property
    def num_available(self) -> int:
        """Blocks that `allocate` can hand out now (free, or cached and evictable)."""
        return len(self._free) + len(self._cached)

    def counts(self) -> BlockCounts:
        """Blocks by state."""
        free, cached = len(self._free), len(self._cached)
        return BlockCounts(self.num_blocks, free, cached, self.num_blocks - free - cached)

    def allocate(self, count: int) -> list[int] | None:
        """Takes `count` blocks with one reference each, evicting cached ones last; None (nothing taken) if too few."""
        if count > self.num_available:
            return None
        blocks = []
        for _ in range(count):
            if self._free:
                block = self._free.popleft()
            else:
                block, _ = self._cached.popitem(last=False)
                name = self._name_of.pop(block)
                del self._block_of[name]
                self.journal.toggle(name, False)
            self._references[block] = 1
            blocks.append(block)
        return blocks

    def match(self, names: Sequence[bytes]) -> list[int]:
        """Blocks of the longest known prefix of `names`; takes no reference."""
        blocks = []
        for name in names:
            block = self._block_of.get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def acquire(self, blocks: Iterable[int]) -> None:
        """Adds a reference to each block, which must be cached or owned."""
        for block in blocks:
            if self._references[block] == 0:
                del self._cached[block]
            self._references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Gives one reference of each block back, last first, so that a prefix's tail is evicted before its head."""
        for block in reversed(blocks):
            assert self._references[block] > 0, f"block {block} released more often than taken"
            self._references[block] -= 1
            if self._references[block] == 0:
                if block in self._name_of:
                    self._cached[block] = None
                else:
                    self._free.appendleft(block)

    def name(self, block: int, name: bytes) -> None:
        """Makes an owned, fully computed block findable. The first block of a name keeps it."""
        assert self._references[block] > 0, "only owned blocks are named"
        if block not in self._name_of and name not in self._block_of:
            self._name_of[block] = name
            self._block_of[name] = block
            self.journal.toggle(name, True)

    def names(self) -> list[bytes]:
        """Of all blocks that can be found."""
        return list(self._block_of)

    def writable(self, block: int) -> bool:
        """Whether the one owner of `block` may write into it."""
        return self._references[block] == 1 and block not in self._name_of

    def clear_cache(self) -> int:
        """Forgets all cached blocks (owned ones lose their names too) and returns how many became free."""
        count = len(self._cached)
        self._free.extend(self._cached)
        self._cached.clear()
        self._name_of.clear()
        self._block_of.clear()
        self.journal.clear()
        return count

    def check(self) -> None:
        """Asserts every invariant; O(num_blocks), for tests and idle moments."""
        owned = {b for b in range(self.num_blocks) if self._references[b] > 0}
        free, cached = set(self._free), set(self._cached)
        assert len(free) == len(self._free), "a block is twice in the free list"
        assert not free & cached, "a free block is cached too"
        assert not owned & (free | cached), "an owned block is free or cached too"
        assert len(free) + len(cached) + len(owned) == self.num_blocks, "a block is lost"
        assert all(b in self._name_of for b in cached), "a cached block has no name"
        assert not any(b in self._name_of for b in free), "a free block has a name"
        assert {n: b for b, n in self._name_of.items()} == self._block_of, "names and blocks disagree"
        assert all(count >= 0 for count in self._references)
