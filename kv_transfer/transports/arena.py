"""Who owns which part of a staging arena: a first-fit free list, pure arithmetic, no memory of its own."""

from __future__ import annotations

__all__ = ["ALIGNMENT_BYTES", "DEFAULT_ARENA_BYTES", "MAX_ARENA_BYTES", "ArenaAllocator"]

ALIGNMENT_BYTES = 64
DEFAULT_ARENA_BYTES = 64 << 20
MAX_ARENA_BYTES = 4 << 30


class ArenaAllocator:
    """Hands out aligned, disjoint ranges of `[0, capacity_bytes)`. Not thread-safe.

    Holes are kept sorted by offset and never touch each other, so `free + used == capacity` and a fully freed arena is
    one hole again.
    """

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // ALIGNMENT_BYTES * ALIGNMENT_BYTES
        assert self.capacity_bytes > 0, f"an arena needs at least {ALIGNMENT_BYTES} bytes, not {capacity_bytes}"
        self._holes: list[tuple[int, int]] = [(0, self.capacity_bytes)]
        self._used: dict[int, int] = {}

    @property
    def used_bytes(self) -> int:
        """Bytes handed out, padding included."""
        return sum(self._used.values())

    def allocate(self, num_bytes: int) -> int | None:
        """Offset of a free range of at least `num_bytes` bytes; None while no hole is large enough."""
        size = -(-max(num_bytes, 1) // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        for i, (begin, end) in enumerate(self._holes):
            if end - begin >= size:
                if end - begin == size:
                    del self._holes[i]
                else:
                    self._holes[i] = (begin + size, end)
                self._used[begin] = size
                return begin
        return None

    def free(self, offset: int) -> None:
        """Take a range back. Freeing what is not handed out is a bug of the caller."""
        assert offset in self._used, f"offset {offset} is not handed out"
        begin, end = offset, offset + self._used.pop(offset)
        i = 0
        while i < len(self._holes) and self._holes[i][0] < begin:
            i += 1
        if i < len(self._holes) and self._holes[i][0] == end:
            end = self._holes.pop(i)[1]
        if i > 0 and self._holes[i - 1][1] == begin:
            i -= 1
            begin = self._holes.pop(i)[0]
        self._holes.insert(i, (begin, end))

    def check(self) -> None:
        """Assert that holes and used ranges tile the arena."""
        ranges = sorted([*self._holes, *((begin, begin + size) for begin, size in self._used.items())])
        position = 0
        for begin, end in ranges:
            assert begin == position, f"arena ranges {ranges} do not tile"
            assert end > begin, f"arena ranges {ranges} hold an empty one"
            position = end
        assert position == self.capacity_bytes
        assert all(a[1] < b[0] for a, b in zip(self._holes, self._holes[1:], strict=False)), "holes touch"
