"""When a broken request is tried again: budget and pauses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, UnavailableError
from baton.router.retries import MAX_ATTEMPTS, Retries, pause_s

LOST = BatonError("the stream broke")


def test_a_stream_that_goes_on_each_time_is_never_given_up() -> None:
    retries = Retries()
    for _ in range(1000):
        assert retries.broke(LOST, gained_tokens=8, chance=0.9) == 0.0
    assert retries.attempts == 1000


def test_attempts_that_bring_nothing_are_counted_out() -> None:
    retries = Retries()
    pauses = [retries.broke(LOST, gained_tokens=0, chance=0.999) for _ in range(MAX_ATTEMPTS - 1)]
    assert pauses == sorted(pauses)
    with pytest.raises(UnavailableError, match="20 times; send it again: the stream broke"):
        retries.broke(LOST, gained_tokens=0, chance=0.9)


def test_tokens_fill_the_budget_up_but_not_beyond_it() -> None:
    retries = Retries()
    retries.broke(LOST, gained_tokens=10_000, chance=0.0)
    assert retries.budget == MAX_ATTEMPTS - 1
    for _ in range(10):
        retries.broke(LOST, gained_tokens=0, chance=0.0)
    retries.broke(LOST, gained_tokens=40, chance=0.0)
    assert retries.budget == MAX_ATTEMPTS - 1 - 10 + 5 - 1


@given(st.lists(st.integers(0, 3), min_size=40, max_size=400))
def test_little_progress_ends_some_time(gains: list[int]) -> None:
    retries = Retries()
    with pytest.raises(UnavailableError):
        [retries.broke(LOST, gained_tokens=gained, chance=0.5) for gained in gains]


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_pauses_are_bounded(failures: int, chance: float) -> None:
    assert 0 <= pause_s(failures, chance) <= 2.0
