"""Whether processes grow."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.chaos.growth import WARM_UP_S, Bounds, Sample, excesses, growths, slope

MIB = 2**20


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_the_slope_of_a_line_is_its_slope(steepness: float, height: float) -> None:
    points = [(float(x), height + steepness * x) for x in range(10)]
    assert slope(points) == pytest.approx(steepness, abs=1e-3)


def test_slopes_at_the_edge() -> None:
    assert slope([(1.0, 5.0)]) == 0.0
    assert slope([(1.0, 5.0), (1.0, 7.0)]) == 0.0
    with pytest.raises(ValueError, match="needs points"):
        slope([])


def samples(seconds: int, bytes_per_s: float, per_s: float = 0.0) -> list[Sample]:
    """A process that takes 100 MiB in its first moments and then grows steadily, with noise."""
    draw = random.Random(1)
    return [
        Sample(float(at), int(min(at, 5) * 20 * MIB + at * bytes_per_s + draw.random() * MIB), 20 + int(at * per_s))
        for at in range(seconds)
    ]


def test_warming_up_is_no_growth_and_short_lives_tell_nothing() -> None:
    taken = {("decode-0", 1): samples(120, 0.0), ("decode-0", 2): samples(25, 9.0 * MIB)}
    (growth,) = growths(taken)
    assert (growth.name, growth.pid) == ("decode-0", 1)
    assert growth.span_s == pytest.approx(120 - 1 - WARM_UP_S)
    assert abs(growth.grown_bytes) < MIB
    assert not excesses([growth], Bounds())


def test_growth_beyond_the_bounds_is_told() -> None:
    taken = {("router-0", 7): samples(600, 0.2 * MIB), ("decode-0", 8): samples(600, 0.0, per_s=0.2)}
    found = growths(taken)
    assert [growth.name for growth in found] == ["decode-0", "router-0"]
    assert found[1].slope_bytes_per_min == pytest.approx(12 * MIB, rel=0.01)
    texts = excesses(found, Bounds())
    assert len(texts) == 2
    assert "decode-0 (pid 8) has 116 descriptors more" in texts[0]
    assert "router-0 (pid 7) grew by" in texts[1]
    assert not excesses(found, Bounds(bytes=1e9, descriptors=1e3))
