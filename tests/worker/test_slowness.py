"""How slow a worker says it is: right when it slows down, silent about noise, shapes and the past."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.worker.slowness import Slowness

STEP_EVERY_S = 0.03


class Machine:
    """Steps whose cost is linear in their shape, with noise."""

    def __init__(self, seed: int, *, base_s: float = 0.004, noise: float = 2.0) -> None:
        self.slowness = Slowness()
        self.now_s = 0.0
        self._rng = random.Random(seed)
        self._base_s, self._noise = base_s, noise

    def run(self, steps: int, *, times: float = 1.0) -> float:
        """Slowness after so many steps that take `times` as long as they should."""
        for _ in range(steps):
            rows = self._rng.choice([1, 2, 5, 8, 13])
            prompt = self._rng.choice([0, 0, 0, 16, 100])
            context = rows * self._rng.randrange(50, 400)
            step_s = self._base_s * (1 + 0.1 * rows + 0.02 * prompt + 0.0004 * context)
            step_s *= times * self._rng.uniform(1, self._noise)
            self.now_s += STEP_EVERY_S
            self.slowness.observe(
                rows=rows, new_tokens=rows + prompt, context_tokens=context, step_s=step_s, now_s=self.now_s
            )
        return self.slowness.at(self.now_s)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32), st.floats(1e-5, 1.0))
def test_a_machine_whose_steps_vary_by_two_is_never_called_slow(seed: int, base_s: float) -> None:
    machine = Machine(seed, base_s=base_s)
    for _ in range(20):
        assert machine.run(100) < 4.0
    assert machine.slowness.at(machine.now_s) >= 1.0


@pytest.mark.parametrize("seed", range(5))
def test_ten_times_slower_steps_are_seen_within_a_window_and_forgotten_after(seed: int) -> None:
    machine = Machine(seed)
    machine.run(2000)
    assert machine.run(20, times=10) > 5
    machine.run(20)
    assert machine.run(20) < 4


def test_single_stragglers_do_not_count() -> None:
    machine = Machine(1, noise=1.1)
    machine.run(2000)
    for _ in range(50):
        machine.run(1, times=50)
        assert machine.run(4) < 2


def test_who_computes_nothing_is_not_slow() -> None:
    machine = Machine(2)
    assert machine.slowness.at(0.0) == 0.0
    machine.run(2000)
    assert machine.run(30, times=20) > 5
    assert machine.slowness.at(machine.now_s + 11) == 0.0


def test_what_lasts_becomes_the_best_there_is() -> None:
    machine = Machine(3)
    machine.run(2000)
    assert machine.run(100, times=8) > 4
    assert machine.run(200_000, times=8) < 4


def test_an_unknown_shape_says_nothing() -> None:
    machine = Machine(4, noise=1.0)
    machine.run(2000)
    for _ in range(4):
        machine.slowness.observe(
            rows=64, new_tokens=64, context_tokens=90_000, step_s=9.0, now_s=machine.now_s + STEP_EVERY_S
        )
    assert machine.slowness.at(machine.now_s) < 2


@given(st.lists(st.tuples(st.integers(0, 100), st.integers(0, 10**6), st.floats(0, 1e3)), max_size=60))
def test_any_steps_give_a_number_of_at_least_one_or_none(steps: list[tuple[int, int, float]]) -> None:
    slowness = Slowness()
    for index, (rows, tokens, step_s) in enumerate(steps):
        slowness.observe(
            rows=rows, new_tokens=rows + tokens, context_tokens=tokens, step_s=step_s, now_s=index * STEP_EVERY_S
        )
    said = slowness.at(len(steps) * STEP_EVERY_S)
    assert said == 0.0 or said >= 1.0
