"""Whether processes grow."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.chaos.growth import (
    MIN_ROLE_S,
    SETTLED_S,
    WARM_UP_S,
    Bounds,
    Sample,
    by_role,
    excesses,
    growths,
    slope,
)

MIB = 2**20
REQUESTS_PER_S = 9.0
"""To each router and worker, in the soak."""


@given(st.floats(-1e6, 1e6), st.floats(-1e6, 1e6))
def test_the_slope_of_a_line_is_its_slope(steepness: float, height: float) -> None:
    points = [(float(x), height + steepness * x) for x in range(10)]
    assert slope(points) == pytest.approx(steepness, abs=1e-3)


def test_slopes_at_the_edge() -> None:
    assert slope([(1.0, 5.0)]) == 0.0
    assert slope([(1.0, 5.0), (1.0, 7.0)]) == 0.0
    with pytest.raises(ValueError, match="needs points"):
        slope([])


def life(
    seconds: int,
    grown_mib: Callable[[float], float],
    *,
    descriptors: float = 0.0,
    noise_mib: float = 1.0,
    seed: int = 1,
) -> list[Sample]:
    """A process that takes 100 MiB in its first moments, and then what `grown_mib` says, with noise."""
    draw = random.Random(seed)
    return [
        Sample(
            float(at),
            int((min(at, 5) * 20 + grown_mib(at) + noise_mib * draw.random()) * MIB),
            20 + int(at * descriptors),
        )
        for at in range(seconds)
    ]


def lives(seed: int, grown_mib: Callable[[float], float]) -> dict[tuple[str, int], list[Sample]]:
    """Of a pool of two whose members die now and then, in twenty minutes, each with the noise of a real one."""
    draw = random.Random(seed)
    taken: dict[tuple[str, int], list[Sample]] = {}
    for index in range(2):
        left_s = 1200
        while left_s > 0:
            seconds = min(left_s, draw.randrange(30, 400))
            left_s -= seconds
            pid = len(taken) + 1
            taken[f"decode-{index}", pid] = life(seconds, grown_mib, noise_mib=6.0, seed=1000 * seed + pid)
    return taken


def test_warming_up_is_no_growth_and_short_lives_tell_nothing() -> None:
    taken = {("decode-0", 1): life(120, lambda _: 0.0), ("decode-0", 2): life(25, lambda at: 9.0 * at)}
    (growth,) = growths(taken)
    assert (growth.name, growth.pid) == ("decode-0", 1)
    assert growth.span_s == pytest.approx(120 - 1 - WARM_UP_S)
    assert growth.later_s == pytest.approx(growth.span_s / 2, abs=1.0)
    assert abs(growth.grown_bytes) < MIB
    assert not excesses([growth], Bounds())


def test_what_levels_off_is_no_leak() -> None:
    taken = {("router-0", 1): life(182, lambda at: 24.0 * (1.0 - math.exp(-at / 40.0)))}
    assert not excesses(growths(taken), Bounds())


def test_steady_growth_of_one_process_is_told() -> None:
    taken = {("router-0", 1): life(182, lambda at: at * 24.0 / 182)}
    (text,) = excesses(growths(taken), Bounds())
    assert "router-0 (pid 1) grew by 10." in text


@pytest.mark.parametrize("seed", range(10))
def test_a_few_kib_with_each_request_show_in_all_lives_together(seed: int) -> None:
    kib_per_request = 3.0
    found = growths(lives(seed, lambda at: at * REQUESTS_PER_S * kib_per_request / 1024))
    (text,) = excesses(found, Bounds())
    assert text.startswith("decode: ")
    assert by_role(found)[0].slope_bytes_per_min == pytest.approx(
        60 * REQUESTS_PER_S * kib_per_request * 1024, rel=0.25
    )
    assert not excesses(growths(lives(seed, lambda _: 0.0)), Bounds())
    assert not excesses(growths(lives(seed, lambda at: 20.0 * (1.0 - math.exp(-at / 15.0)))), Bounds())


@pytest.mark.parametrize("seed", range(10))
def test_a_role_that_levels_off_slowly_is_judged_when_it_has_settled(seed: int) -> None:
    """As routers do: 12 MiB in the first minute and a half of each life, then none."""
    (role,) = by_role(growths(lives(seed, lambda at: 12.0 * min(at / SETTLED_S, 1.0))))
    assert role.is_settled
    assert role.looked_s >= MIN_ROLE_S
    assert abs(role.slope_bytes_per_min) < MIB
    leaking = growths(lives(seed, lambda at: 12.0 * min(at / SETTLED_S, 1.0) + at * 1.6 / 60))
    assert any(text.startswith("decode: ") for text in excesses(leaking, Bounds()))


def test_lives_too_short_to_settle_are_judged_by_their_later_halves() -> None:
    taken = {("decode-0", pid): life(80, lambda at: 3.0 * at / 60, seed=pid) for pid in range(10)}
    found = growths(taken)
    (role,) = by_role(found)
    assert not role.is_settled
    assert role.looked_s >= MIN_ROLE_S
    (text,) = excesses(found, Bounds())
    assert text.startswith("decode: 10 lives grew by")


@pytest.mark.parametrize("seed", range(10))
def test_memory_that_comes_and_goes_is_no_leak(seed: int) -> None:
    draw = random.Random(seed)
    phases = [draw.uniform(0.0, 100.0) for _ in range(2)]
    # Four MiB more and less in 50 s, where only a minute or two are looked at.
    taken = {
        (f"decode-{index}", index): life(240, lambda at, p=phase: 4.0 * math.sin((at + p) / 8.0), seed=seed)  # type: ignore[misc]
        for index, phase in enumerate(phases)
    }
    assert not excesses(growths(taken), Bounds())


def test_growth_beyond_the_bounds_is_told() -> None:
    taken = {("router-0", 7): life(600, lambda at: 0.2 * at), ("decode-0", 8): life(600, lambda _: 0, descriptors=0.2)}
    found = growths(taken)
    assert [growth.name for growth in found] == ["decode-0", "router-0"]
    assert found[1].slope_bytes_per_min == pytest.approx(12 * MIB, rel=0.02)
    texts = excesses(found, Bounds())
    assert len(texts) == 4
    assert "decode-0 (pid 8) has 58 descriptors more" in texts[0]
    assert "router-0 (pid 7) grew by" in texts[1]
    assert "decode: 1 lives took 12.0 descriptors a minute" in texts[2]
    assert "router: 1 lives grew by" in texts[3]
    bounds = Bounds(bytes=1e9, descriptors=1e3, role_bytes_per_min=1e9, role_descriptors_per_min=1e3)
    assert not excesses(found, bounds)
