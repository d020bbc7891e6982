"""Slots: stable while a sequence runs, never taken from one that a step on the device may still read."""

from __future__ import annotations

import random

import pytest

from baton.engine.sequence_slots import SequenceSlots


def test_a_running_sequence_keeps_its_slot() -> None:
    slots = SequenceSlots(4)
    first, second = [1], [1]
    slots.begin_step()
    one, is_new = slots.place(first)
    assert is_new
    other, _ = slots.place(second)
    assert one.slot != other.slot, "equal block ids do not make one sequence"
    one.num_blocks = 1
    for _ in range(5):
        slots.begin_step()
        again, is_new = slots.place(first)
        assert again is one
        assert not is_new
        assert again.num_blocks == 1


def test_two_rows_of_one_sequence_are_our_own_bug() -> None:
    slots = SequenceSlots(4)
    blocks = [1]
    slots.begin_step()
    slots.place(blocks)
    with pytest.raises(AssertionError, match="two rows"):
        slots.place(blocks)


@pytest.mark.parametrize("seed", range(5))
def test_slots_of_this_step_and_the_one_before_are_distinct(seed: int) -> None:
    rng = random.Random(seed)
    batch = 6
    slots = SequenceSlots(2 * batch)
    live = [[n] for n in range(batch)]
    before: dict[int, int] = {}
    for _ in range(300):
        slots.begin_step()
        # Some go, others come; some only pause.
        live = [blocks if rng.random() < 0.8 else [rng.randrange(100)] for blocks in live]
        now = {id(blocks): slots.place(blocks)[0].slot for blocks in rng.sample(live, rng.randrange(1, batch + 1))}
        assert len(set(now.values())) == len(now)
        for identity, slot in now.items():
            assert all(other == identity for other, held in before.items() if held == slot)
        before = now
