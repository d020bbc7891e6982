"""Objectives kept and missed."""

from __future__ import annotations

import pytest

from baton.router.attainment import Attainment, attainment


@pytest.mark.parametrize(
    ("ttft_limit_s", "tpot_limit_s", "ttft_s", "duration_s", "tokens", "expected"),
    [
        (None, None, 9.0, 99.0, 3, None),
        (0.5, None, 0.5, 99.0, 3, "kept"),
        (0.5, None, 0.51, 0.6, 3, "ttft_missed"),
        (0.5, None, None, 0.1, 0, "ttft_missed"),
        (None, 0.1, None, 0.1, 0, "ttft_missed"),
        (None, 0.125, 1.0, 1.25, 3, "kept"),
        (None, 0.125, 1.0, 1.26, 3, "tpot_missed"),
        (None, 0.125, 1.0, 9.0, 1, "kept"),
        (0.5, 0.1, 1.0, 9.0, 3, "ttft_missed"),
    ],
)
def test_what_became_of_it(
    ttft_limit_s: float | None,
    tpot_limit_s: float | None,
    ttft_s: float | None,
    duration_s: float,
    tokens: int,
    expected: Attainment | None,
) -> None:
    found = attainment(
        ttft_limit_s=ttft_limit_s, tpot_limit_s=tpot_limit_s, ttft_s=ttft_s, duration_s=duration_s, tokens=tokens
    )
    assert found == expected
