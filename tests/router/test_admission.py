"""Admission: bounds hold for any sequence, refusals carry a usable hint."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import OverloadedError
from baton.router.admission import Admission


def test_refuses_beyond_either_bound() -> None:
    admission = Admission(max_requests=2, max_tokens=100)
    admission.admit(num_requests=1, num_tokens=60, now_s=0)
    with pytest.raises(OverloadedError, match="max_queued_tokens=100"):
        admission.admit(num_requests=1, num_tokens=41, now_s=0)
    admission.admit(num_requests=1, num_tokens=40, now_s=0)
    with pytest.raises(OverloadedError, match="max_queued_requests=2"):
        admission.admit(num_requests=1, num_tokens=0, now_s=0)


def test_one_large_request_is_let_in_when_alone() -> None:
    admission = Admission(max_requests=2, max_tokens=100)
    admission.admit(num_requests=1, num_tokens=1000, now_s=0)
    with pytest.raises(OverloadedError):
        admission.admit(num_requests=1, num_tokens=1, now_s=0)
    admission.release(num_requests=1, num_tokens=1000, now_s=1)
    with pytest.raises(OverloadedError):
        admission.admit(num_requests=3, num_tokens=1, now_s=1)


def test_the_hint_follows_the_pace_of_completions() -> None:
    admission = Admission(max_requests=10, max_tokens=10_000)
    for second in range(11):
        admission.admit(num_requests=1, num_tokens=1, now_s=2 * second)
        admission.release(num_requests=1, num_tokens=1, now_s=2 * second)
    admission.admit(num_requests=10, num_tokens=10, now_s=20)
    with pytest.raises(OverloadedError) as caught:
        admission.admit(num_requests=5, num_tokens=5, now_s=20)
    assert caught.value.retry_after_s == pytest.approx(5 * 20 / 11)


@given(st.lists(st.tuples(st.integers(1, 5), st.integers(0, 60), st.booleans()), max_size=60))
def test_counts_are_conserved(steps: list[tuple[int, int, bool]]) -> None:
    admission = Admission(max_requests=8, max_tokens=100)
    held: list[tuple[int, int]] = []
    hints: list[float] = []
    for now, (requests, tokens, release_one) in enumerate(steps):
        if release_one and held:
            ended = held.pop(0)
            admission.release(num_requests=ended[0], num_tokens=ended[1], now_s=now)
        try:
            admission.admit(num_requests=requests, num_tokens=tokens, now_s=now)
            held.append((requests, tokens))
        except OverloadedError as error:
            hints.append(error.retry_after_s)
        assert admission.num_requests == sum(requests for requests, _ in held) <= 8
        assert admission.num_tokens == sum(tokens for _, tokens in held) <= 100
    assert all(1 <= hint <= 60 for hint in hints)
