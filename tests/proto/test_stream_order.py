"""Numbers on a stream: nothing is lost unseen, nothing is taken twice."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.proto.stream_order import SequenceGapError, StreamOrder


def test_what_is_sent_in_order_is_taken() -> None:
    sender, receiver = StreamOrder(), StreamOrder()
    assert all(receiver.accept(sender.next()) for _ in range(100))


def test_a_gap_says_what_is_missing() -> None:
    order = StreamOrder()
    for seq in range(1, 6):
        order.accept(seq)
    with pytest.raises(SequenceGapError, match="message 7 came after 5"):
        order.accept(7)


def test_a_sender_that_does_not_count_is_taken_until_it_does() -> None:
    order = StreamOrder()
    assert order.accept(0)
    assert order.accept(0)
    assert order.accept(1)
    with pytest.raises(SequenceGapError, match="message 0 came after 1"):
        order.accept(0)


@given(st.lists(st.integers(1, 12), max_size=40))
def test_what_is_taken_is_the_beginning_of_what_was_sent(arrivals: list[int]) -> None:
    order, taken = StreamOrder(), []
    for seq in arrivals:
        try:
            if order.accept(seq):
                taken.append(seq)
        except SequenceGapError:
            assert seq > len(taken) + 1
            break
    assert taken == list(range(1, len(taken) + 1))
