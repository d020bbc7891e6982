"""How careful early refusal is: of who has to wait more than of who goes at once."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

from baton.router.admission.early_refusal import MAX_CORRECTION, EarlyRefusal, Limit
from baton.router.admission.pace import Pace

WITHIN_1_S = Limit(ttft_s=1.0, deadline_s=math.inf)


def learned(*ratios: float) -> EarlyRefusal:
    refusal = EarlyRefusal(slack=1.0)
    for ratio in ratios:
        refusal.served(0.1, ttft_s=ratio, predicted_s=1.0)
    return refusal


def known_pace() -> Pace:
    """A queue that gives 1,000 tokens a second."""
    pace = Pace()
    pace.began_to_wait(0.0)
    for second in range(1, 11):
        pace.granted(1000.0, float(second), is_last=second == 10)
    return pace


def test_who_waits_is_refused_for_what_one_in_ten_was_late_by() -> None:
    """One of ten was 1.8 times as late as predicted: 0.7 s are believed of who goes at once, and not of who waits."""
    refusal = learned(*([1.0] * 9 + [1.8]) * 10)
    at_once = refusal.judge(WITHIN_1_S, known_pace(), ahead_tokens=0, predicted_s=0.7, now_s=20.0)
    waiting = refusal.judge(WITHIN_1_S, known_pace(), ahead_tokens=400, predicted_s=0.3, now_s=20.0)
    assert at_once.wait_s + at_once.service_s == waiting.wait_s + waiting.service_s == 0.7
    assert at_once.reason == ""
    assert waiting.reason == "slo"
    assert refusal.misses(WITHIN_1_S, predicted_s=0.1, arrival_s=0.0, now_s=0.85) == "slo"


@given(st.lists(st.floats(1e-6, 1e6), max_size=200))
def test_whatever_came_it_is_bounded_and_no_less_careful_of_who_waits(ratios: list[float]) -> None:
    refusal = learned(*ratios)
    assert 1 / MAX_CORRECTION <= refusal.correction(waits=False) <= refusal.correction(waits=True) <= MAX_CORRECTION
