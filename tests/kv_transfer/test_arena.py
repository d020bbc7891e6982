"""The arena's free list."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.kv_transfer.transports.arena import ALIGNMENT_BYTES, ArenaAllocator


@given(steps=st.lists(st.tuples(st.booleans(), st.integers(0, 1500)), max_size=80))
def test_ranges_tile_the_arena_after_every_step(steps: list[tuple[bool, int]]) -> None:
    arena = ArenaAllocator(4100)
    held: dict[int, int] = {}
    for is_free, value in steps:
        if is_free and held:
            offset = list(held)[value % len(held)]
            arena.free(offset)
            del held[offset]
        elif not is_free:
            allocated = arena.allocate(value)
            if allocated is not None:
                assert allocated % ALIGNMENT_BYTES == 0
                assert all(allocated + value <= o or o + n <= allocated for o, n in held.items() if n and value)
                held[allocated] = value
        arena.check()
    for offset in list(held):
        arena.free(offset)
    assert arena.used_bytes == 0
    assert arena.allocate(4096) == 0, "one hole again"


def test_a_full_arena_says_so_and_a_double_free_is_a_bug() -> None:
    arena = ArenaAllocator(128)
    first = arena.allocate(100)
    assert first == 0
    assert arena.allocate(1) is None
    arena.free(first)
    with pytest.raises(AssertionError, match="not handed out"):
        arena.free(first)
