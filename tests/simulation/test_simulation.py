"""The simulation itself: the same seed does the same, and its checkers catch what they are there for."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
from tests.simulation.model import expected_answer, logits_after
from tests.simulation.mutations import MUTATIONS, Mutation
from tests.simulation.run import forget_runs, run_seed
from tests.simulation.scenario import Scenario

# A world that a defect stopped leaves its coroutines where they were; closing them finds no loop, which says nothing.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")

_MAX_SEEDS = 120


@pytest.fixture(autouse=True)
def _silence() -> Iterator[None]:
    yield
    forget_runs()


@pytest.mark.parametrize("seed", [3, 17, 65])
def test_the_same_seed_does_the_same(seed: int) -> None:
    first, second = run_seed(seed), run_seed(seed)
    assert first.violation is None
    assert (first.trace_hash, first.num_events, first.virtual_s) == (
        second.trace_hash,
        second.num_events,
        second.virtual_s,
    )
    assert run_seed(seed + 1).trace_hash != first.trace_hash


def test_scenarios_are_drawn_from_the_seed_alone() -> None:
    assert Scenario.draw(5).describe() == Scenario.draw(5).describe()
    assert Scenario.draw(5).describe() != Scenario.draw(6).describe()


def test_the_oracle_follows_its_logits() -> None:
    scenario = Scenario.draw(1)
    request = next(request for request in scenario.requests if request.sampling.temperature == 0.0)
    tokens, _ = expected_answer(request.prompt, request.sampling, 48)
    assert len(tokens) <= request.sampling.max_tokens
    if request.sampling.repetition_penalty == 1.0 and not request.sampling.min_tokens:
        assert tokens[0] == int(logits_after(request.prompt)[0].argmax())


def _faults_of(seed: int) -> set[str]:
    return {fault.kind for fault in Scenario.draw(seed).faults}


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_defect_is_caught(mutation: Mutation) -> None:
    seeds = (seed for seed in itertools.count() if not mutation.needs or mutation.needs in _faults_of(seed))
    for seed in itertools.islice(seeds, _MAX_SEEDS):
        violation = run_seed(seed, mutation=mutation).violation
        if violation is not None:
            assert violation.checker in mutation.caught_by, violation
            return
    pytest.fail(f"none of {_MAX_SEEDS} seeds finds that {mutation.name}")
