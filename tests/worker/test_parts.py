"""Parts of a handover: every order of events decides each outcome once."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.worker.parts import Parts


@given(st.integers(1, 6), st.integers(0, 2**32), st.sets(st.integers(0, 5)))
def test_each_outcome_is_decided_once(num_ranks: int, seed: int, failing: set[int]) -> None:
    failing &= set(range(num_ranks))
    rng = random.Random(seed)
    pending = {rank: ["failed" if rank in failing else "landed", "settled"] for rank in range(num_ranks)}
    parts = Parts(range(num_ranks))
    landed = failed = settled = 0
    while pending:
        rank = rng.choice(sorted(pending))
        event = pending[rank].pop(0)
        if not pending[rank]:
            del pending[rank]
        if event == "landed":
            landed += parts.landed(rank)
        elif event == "failed":
            failed += parts.failed(rank, "paper jam")
        else:
            settled += parts.settled(rank)
        assert settled == (not pending)
    assert (landed, failed, settled) == (not failing, bool(failing), 1)
    assert parts.have_landed == (not failing)
    assert bool(parts.failure) == bool(failing)


def test_the_first_failure_names_its_rank() -> None:
    parts = Parts([0, 1])
    assert parts.failed(1, "no ink")
    assert not parts.failed(0, "no paper")
    assert parts.failure == "rank 1: no ink"
    assert not parts.landed(0)
    alone = Parts([0])
    alone.failed(0, "no ink")
    assert alone.failure == "no ink"


def test_what_cannot_be_is_a_bug() -> None:
    parts = Parts([0, 1])
    parts.landed(0)
    parts.settled(0)
    for event in (lambda: parts.landed(0), lambda: parts.settled(0), lambda: parts.landed(2)):
        with pytest.raises(AssertionError):
            event()
