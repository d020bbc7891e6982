"""Which steps are told, and what of them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.scheduler import Row, StepPlan
from baton.worker.step_log import StepLog


def _row(start: int, count: int, *, prompt: int, samples: bool = True) -> Row:
    return Row(cast("Any", SimpleNamespace(num_prompt=prompt)), start, count, samples)


def _decode(rows: int = 2) -> StepPlan:
    return StepPlan(rows=[_row(100, 1, prompt=50) for _ in range(rows)], num_decode_rows=rows)


def _prompt(tokens: int = 64) -> StepPlan:
    return StepPlan(rows=[_row(0, tokens, prompt=tokens)])


def test_a_mixed_step_in_words() -> None:
    plan = StepPlan(
        rows=[_row(100, 1, prompt=50), _row(60, 1, prompt=50), _row(32, 3, prompt=64, samples=False)],
        num_decode_rows=2,
    )
    sample = StepLog().observe(plan, 0.01)
    assert sample is not None
    assert (sample.decode_rows, sample.decode_context_tokens) == (2, 101 + 61)
    assert (sample.prefill_tokens, sample.prefill_attended_tokens) == (3, 33 + 34 + 35)
    assert sample.step_s == 0.01


def test_the_last_token_of_a_prompt_is_no_decode_row() -> None:
    sample = StepLog().observe(StepPlan(rows=[_row(63, 1, prompt=64)]), 0.01)
    assert sample is not None
    assert (sample.decode_rows, sample.prefill_tokens, sample.prefill_attended_tokens) == (0, 1, 64)


def test_an_idle_step_is_not_told() -> None:
    assert StepLog().observe(StepPlan(), 0.01) is None


def test_decode_steps_are_told_at_a_bounded_rate_and_prompts_between_them() -> None:
    log = StepLog()
    told = sum(log.observe(_decode(), 0.001) is not None for _ in range(10_000))
    assert 150 <= told <= 205  # in ten busy seconds
    assert all(log.observe(_prompt(), 0.02) is not None for _ in range(50))
    assert sum(log.observe(_prompt(), 0.001) is not None for _ in range(1000)) <= 130


@given(st.lists(st.floats(0.001, 0.2), min_size=20, max_size=100), st.integers(0, 19), st.floats(0.001, 100))
def test_whether_a_step_is_told_does_not_depend_on_how_long_it_takes(
    times_s: list[float], at: int, other_s: float
) -> None:
    def told(last_s: float) -> bool:
        log = StepLog()
        for step_s in times_s[:at]:
            log.observe(_decode(), step_s)
        return log.observe(_decode(), last_s) is not None

    assert told(times_s[at]) == told(other_s)
