"""The block pool keeps every block in exactly one state, whatever is asked of it."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from baton.engine.block_pool import BlockPool


def test_allocation_takes_uncached_blocks_first_then_the_least_recently_used() -> None:
    pool = BlockPool(4, 16)
    first = pool.allocate(3)
    assert first is not None
    for index, block in enumerate(first):
        pool.name(block, bytes([index]))
    pool.release(first)
    assert pool.counts().cached == 3
    assert pool.allocate(1) == [3]  # the one that was never cached
    # The prefix's tail was released first, so it is evicted first and the head stays findable longest.
    assert pool.allocate(1) == [first[2]]
    assert pool.match([b"\x00", b"\x01", b"\x02"]) == first[:2]
    pool.check()


def test_too_large_an_allocation_takes_nothing() -> None:
    pool = BlockPool(3, 16)
    assert pool.allocate(4) is None
    assert pool.counts().free == 3


def test_shared_or_named_blocks_are_not_writable() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(2)
    assert blocks is not None
    assert pool.writable(blocks[0])
    pool.acquire([blocks[0]])
    assert not pool.writable(blocks[0])
    pool.name(blocks[1], b"name")
    assert not pool.writable(blocks[1])


def test_clear_cache_frees_everything_unowned() -> None:
    pool = BlockPool(3, 16)
    blocks = pool.allocate(2)
    assert blocks is not None
    pool.name(blocks[0], b"a")
    pool.name(blocks[1], b"b")
    pool.release([blocks[0]])
    assert pool.clear_cache() == 1
    assert pool.match([b"a"]) == []
    pool.check()
    pool.release([blocks[1]])
    pool.check()
    assert pool.counts().free == 3


_Operation = st.tuples(st.sampled_from(["allocate", "release", "name", "match", "clear"]), st.integers(0, 50))


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 12), st.lists(_Operation, max_size=60))
def test_every_block_has_one_state_after_every_operation(num_blocks: int, operations: list[tuple[str, int]]) -> None:
    pool = BlockPool(num_blocks, 4)
    held: list[list[int]] = []
    for name, number in operations:
        if name == "allocate":
            blocks = pool.allocate(number % 5)
            if blocks:
                held.append(blocks)
        elif name == "release" and held:
            pool.release(held.pop(number % len(held)))
        elif name == "name" and held:
            blocks = held[number % len(held)]
            pool.name(blocks[0], bytes([number]))
        elif name == "match":
            hits = pool.match([bytes([number])])
            pool.acquire(hits)
            if hits:
                held.append(hits)
        elif name == "clear":
            pool.clear_cache()
        pool.check()
        counts = pool.counts()
        assert counts.free + counts.cached + counts.owned == counts.total
        assert counts.owned == len({block for blocks in held for block in blocks})
    for blocks in held:
        pool.release(blocks)
    pool.check()
    assert pool.counts().owned == 0
