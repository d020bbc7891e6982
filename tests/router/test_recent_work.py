"""Recent work: it fades, newcomers begin with the mean, and no age breaks it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.routing.recent_work import RecentWork


def test_work_fades_by_half_in_a_half_life() -> None:
    work = RecentWork(half_life_s=10)
    work.add("a", 100, 0)
    work.add("a", 100, 10)
    assert work.tokens(["a"], 20)["a"] == pytest.approx(75)


def test_who_is_new_begins_with_the_mean_of_its_peers() -> None:
    work = RecentWork(half_life_s=10)
    work.add("a", 100, 0)
    work.add("b", 300, 0)
    assert work.tokens(["a", "b", "c"], 0)["c"] == pytest.approx(200)
    work.forget("a")
    assert work.tokens(["a", "b"], 0)["a"] == pytest.approx(300)
    assert work.tokens(["x", "y"], 0) == {"x": 0, "y": 0}


@given(st.lists(st.tuples(st.sampled_from("ab"), st.integers(0, 10**6), st.floats(0, 1e5)), max_size=30))
def test_it_equals_the_plain_sum(steps: list[tuple[str, int, float]]) -> None:
    work, now_s = RecentWork(half_life_s=7), 0.0
    given_: list[tuple[str, int, float]] = []
    for name, tokens, pause_s in steps:
        now_s += pause_s
        work.add(name, tokens, now_s)
        given_.append((name, tokens, now_s))
    for name in {each for each, _, _ in given_}:
        want = sum(tokens * 0.5 ** min((now_s - at_s) / 7, 1000.0) for each, tokens, at_s in given_ if each == name)
        assert work.tokens([name], now_s)[name] == pytest.approx(want, rel=1e-6, abs=1e-6)
