"""Whoever applies all changes of a pool's journal to a set of keys has the keys of the pool's names."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.block_journal import BlockJournal, block_keys
from baton.engine.block_pool import BlockPool

_NUM_BLOCKS = 6


def _name(number: int) -> bytes:
    return number.to_bytes(8, "big") + bytes(24)


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("use"), st.lists(st.integers(0, 9), min_size=1, max_size=_NUM_BLOCKS)),
            st.tuples(st.just("take"), st.just([])),
            st.tuples(st.just("clear"), st.just([])),
        ),
        max_size=40,
    )
)
def test_all_changes_together_are_the_pools_names(work: list[tuple[str, list[int]]]) -> None:
    pool, held = BlockPool(_NUM_BLOCKS, 16), set[int]()
    for what, numbers in work:
        if what == "use":
            blocks = pool.allocate(len(numbers))
            assert blocks is not None
            for block, number in zip(blocks, numbers, strict=True):
                pool.name(block, _name(number))
            pool.release(blocks)
        elif what == "clear":
            pool.clear_cache()
        else:
            pool.journal.take().apply(held)
            assert held == set(block_keys(pool.names()))
            assert not pool.journal
        pool.check()
    pool.journal.take().apply(held)
    assert held == set(block_keys(pool.names()))


def test_what_comes_and_goes_between_two_looks_is_not_told() -> None:
    journal = BlockJournal()
    journal.toggle(_name(1), True)
    journal.toggle(_name(2), True)
    journal.toggle(_name(1), False)
    change = journal.take()
    assert (change.stored, change.removed, change.cleared) == ([2], [], False)
    journal.toggle(_name(2), False)
    journal.toggle(_name(2), True)
    assert not journal.take()
    journal.toggle(_name(3), True)
    journal.clear()
    journal.toggle(_name(4), True)
    change = journal.take()
    assert (change.stored, change.removed, change.cleared) == ([4], [], True)


def test_a_key_is_the_beginning_of_a_name() -> None:
    assert block_keys([b"\x01" + bytes(31), bytes(7) + b"\xff" * 25]) == [1 << 56, 255]
    assert block_keys([]) == []
