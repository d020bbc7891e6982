"""When a broken request is tried again: suspicion, budget, pauses."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import BatonError, QuarantinedError, UnavailableError
from baton.router.retries import MAX_ATTEMPTS, MAX_SUSPICIONS, Retries, pause_s

LOST = BatonError("the stream broke")


def test_a_stream_that_goes_on_each_time_is_never_suspected() -> None:
    retries = Retries()
    for _ in range(MAX_ATTEMPTS - 1):
        assert retries.broke(LOST, has_died=True, has_progressed=True, chance=0.9) == 0.0
    with pytest.raises(UnavailableError, match="20 times"):
        retries.broke(LOST, has_died=True, has_progressed=True, chance=0.9)


def test_deaths_before_a_token_are_suspicious_and_a_token_clears_them() -> None:
    retries = Retries()
    retries.broke(LOST, has_died=True, has_progressed=False, chance=0.5)
    retries.broke(LOST, has_died=True, has_progressed=True, chance=0.5)
    retries.broke(LOST, has_died=True, has_progressed=False, chance=0.5)
    with pytest.raises(QuarantinedError, match="the stream broke"):
        retries.broke(LOST, has_died=True, has_progressed=False, chance=0.5)
    assert retries.suspicions == MAX_SUSPICIONS


def test_a_worker_that_gives_a_request_up_is_no_death() -> None:
    retries = Retries()
    pauses = [retries.broke(LOST, has_died=False, has_progressed=False, chance=0.999) for _ in range(8)]
    assert pauses == sorted(pauses)
    assert retries.suspicions == 0


@given(st.integers(1, 10_000), st.floats(0, 1, exclude_max=True))
def test_pauses_are_bounded(failures: int, chance: float) -> None:
    assert 0 <= pause_s(failures, chance) <= 2.0
