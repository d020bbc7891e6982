"""Arrival processes and lengths: rates, shapes, and that a seed gives the same again."""

from __future__ import annotations

import random
import statistics
from itertools import islice, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cluster.loadgen.arrivals import ArrivalProcess, times_s
from baton.cluster.loadgen.lengths import Lengths
from baton.errors import ConfigError

PROCESSES = ["constant", "poisson", "gamma:cv=0.5", "gamma:cv=3", "bursts:on_s=1,off_s=3"]


def gaps_of(text: str, rate: float, count: int, seed: str = "seed") -> list[float]:
    drawn = islice(times_s(ArrivalProcess.parse(text), rate, seed), count)
    return [after - before for before, after in pairwise([0.0, *drawn])]


@given(text=st.sampled_from(PROCESSES), rate=st.floats(0.01, 10_000), seed=st.text(max_size=8))
@settings(max_examples=60, deadline=None)
def test_times_ascend_and_are_a_function_of_the_seed(text: str, rate: float, seed: str) -> None:
    process = ArrivalProcess.parse(text)
    first = list(islice(times_s(process, rate, seed), 50))
    assert first == list(islice(times_s(process, rate, seed), 50))
    assert all(before <= after for before, after in pairwise([0.0, *first]))
    if process.kind != "constant":
        assert first != list(islice(times_s(process, rate, seed + "x"), 50))


@pytest.mark.parametrize("rate", [0.5, 200.0])
@pytest.mark.parametrize("text", ["constant", "poisson", "gamma:cv=0.5", "gamma:cv=3"])
def test_gaps_have_the_asked_mean_and_spread(text: str, rate: float) -> None:
    gaps = gaps_of(text, rate, 60_000)
    cv = {"constant": 0.0, "poisson": 1.0}.get(text) if ":" not in text else float(text.partition("=")[2])
    assert statistics.mean(gaps) * rate == pytest.approx(1, rel=0.06)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) == pytest.approx(cv, rel=0.06, abs=1e-9)


def test_bursts_keep_the_rate_and_pause_between() -> None:
    gaps = gaps_of("bursts:on_s=1,off_s=3", 20.0, 100_000)
    assert statistics.mean(gaps) * 20 == pytest.approx(1, rel=0.1)
    # On a fourth of the time: four times the rate while on, which is the median gap of an exponential.
    assert statistics.median(gaps) * 80 == pytest.approx(0.693, rel=0.1)
    assert statistics.pstdev(gaps) / statistics.mean(gaps) > 3


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("weibull", "poisson"),
        ("gamma:cv=0", "above 0"),
        ("gamma:shape=2", "unknown key 'shape'"),
        ("bursts:on_s=nan", "above 0"),
        ("poisson:cv=2", "unknown key"),
    ],
)
def test_arrivals_that_are_refused(text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        ArrivalProcess.parse(text)


@given(low=st.integers(1, 500), more=st.integers(0, 500))
def test_uniform_lengths_stay_within(low: int, more: int) -> None:
    lengths = Lengths.parse(f"{low}-{low + more}", "--input")
    generator = random.Random(1)
    assert all(low <= lengths.draw(generator) <= low + more for _ in range(50))


def test_lengths_of_each_kind() -> None:
    generator = random.Random(1)
    assert {Lengths.parse("256", "--input").draw(generator) for _ in range(5)} == {256}
    assert {Lengths.parse("3-5", "--input").draw(generator) for _ in range(100)} == {3, 4, 5}
    drawn = [Lengths.parse("lognormal:median=200,sigma=0.8,max=2000", "--input").draw(generator) for _ in range(20_000)]
    assert statistics.median(drawn) == pytest.approx(200, rel=0.05)
    assert max(drawn) == 2000
    assert min(drawn) >= 1


@pytest.mark.parametrize("text", ["0", "-3", "10-5", "1.5", "x", "lognormal:median=0", "lognormal:mu=1", ""])
def test_lengths_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--input"):
        Lengths.parse(text, "--input")
