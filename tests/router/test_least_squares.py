"""The online fit: against numpy's, from wrong priors, with constant features, strays, odd input and changed laws."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.router.costs.least_squares import LeastSquares, _solve_non_negative

_numbers = st.floats(0, 1e6, allow_nan=False)


def _law(coefficients: list[float], seed: int, count: int, noise: float = 0.0) -> list[tuple[tuple[float, ...], float]]:
    rng = random.Random(seed)
    samples = []
    for _ in range(count):
        features = (1.0, *(rng.choice([0.0, rng.uniform(0, 10)]) for _ in coefficients[1:]))
        value = sum(c * x for c, x in zip(coefficients, features, strict=True))
        samples.append((features, value * (1 + noise * rng.uniform(-1, 1))))
    return samples


@given(st.integers(0, 10**6), st.integers(2, 5))
def test_a_positive_solution_is_that_of_numpy(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    features = rng.uniform(0, 1, (40, size))
    values = features @ rng.uniform(1, 2, size) + rng.normal(0, 0.01, 40)
    expected = np.linalg.lstsq(features, values, rcond=None)[0]
    found = _solve_non_negative((features.T @ features).tolist(), (features.T @ values).tolist())
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@given(st.integers(0, 10**6), st.integers(1, 5))
def test_no_other_solution_that_is_not_negative_is_better(seed: int, size: int) -> None:
    rng = np.random.default_rng(seed)
    features, values = rng.normal(0, 1, (20, size)), rng.normal(0, 1, 20)
    matrix, vector = features.T @ features + 1e-6 * np.eye(size), features.T @ values
    found = np.array(_solve_non_negative(matrix.tolist(), vector.tolist()))
    assert (found >= 0).all()
    # Karush, Kuhn and Tucker: nothing to gain by moving, but where a bound is in the way.
    slopes = vector - matrix @ found
    assert (slopes <= 1e-7 * (1 + abs(vector))).all()
    np.testing.assert_allclose(slopes[found > 0], 0, atol=1e-7)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.lists(st.floats(0.01, 10), min_size=5, max_size=5))
def test_a_law_is_found_from_any_wrong_prior(seed: int, prior: list[float]) -> None:
    law = [0.5, 0.2, 0.05, 1.0, 0.3]
    fit = LeastSquares(prior=prior, scales=(1.0, 5.0, 5.0, 5.0, 5.0))
    for features, value in _law(law, seed, 150):
        fit.observe(features, value)
    for features, value in _law(law, seed + 1, 20):
        assert fit.predict(features) == pytest.approx(value, rel=0.1)
    assert fit.error < 0.5


@given(st.lists(st.tuples(st.lists(_numbers, min_size=3, max_size=3), st.floats(allow_nan=True)), max_size=60))
def test_any_input_leaves_a_finite_law_that_is_not_negative(samples: list[tuple[list[float], float]]) -> None:
    fit = LeastSquares(prior=(1e-3, 1e-4, 0.0), scales=(1.0, 100.0, 1e4))
    for features, value in samples:
        fit.observe(features, value)
    assert all(math.isfinite(c) and c >= 0 for c in fit.coefficients)
    assert math.isfinite(fit.error)
    assert math.isfinite(fit.bias)


def test_features_that_never_change_do_no_harm() -> None:
    fit = LeastSquares(prior=(1e-3, 1e-4, 1e-8), scales=(1.0, 100.0, 1e4))
    for _ in range(5000):
        fit.observe((1.0, 8.0, 0.0), 0.02)
    assert fit.predict((1.0, 8.0, 0.0)) == pytest.approx(0.02, rel=0.01)
    assert fit.coefficients[2] == pytest.approx(1e-8, rel=1e-3)  # of what it never saw, it says what it was told
    assert 0.02 < fit.predict((1.0, 16.0, 0.0)) < 0.05


def test_what_is_not_seen_for_long_is_not_forgotten() -> None:
    fit = LeastSquares(prior=(1e-3, 1e-6), scales=(1.0, 100.0))
    for tokens in range(100, 500, 10):
        fit.observe((1.0, float(tokens)), 0.01 + 1e-3 * tokens)
    for _ in range(2000):
        fit.observe((1.0, 0.0), 0.01)
    assert fit.predict((1.0, 400.0)) == pytest.approx(0.41, rel=0.05)


def test_strays_move_little_and_a_changed_law_is_believed() -> None:
    fit = LeastSquares(prior=(1e-3, 1e-4), scales=(1.0, 100.0))
    for features, value in _law([0.01, 0.002], 1, 100, noise=0.05):
        fit.observe(features, value)
    before = fit.predict((1.0, 5.0))
    fit.observe((1.0, 5.0), before * 1000)
    assert fit.predict((1.0, 5.0)) < before * 1.2
    for features, value in _law([0.03, 0.006], 2, 60, noise=0.05):
        fit.observe(features, value)
    assert fit.predict((1.0, 5.0)) == pytest.approx(0.06, rel=0.15)


def test_a_batch_is_as_good_as_single_samples() -> None:
    one, other = (LeastSquares(prior=(1e-3, 1e-4), scales=(1.0, 100.0), forgetting=1.0) for _ in range(2))
    for features, value in _law([0.01, 0.002], 1, 50):
        one.observe(features, value)
        other.fold(features, value)
    other.solve()
    assert one.predict((1.0, 5.0)) == pytest.approx(0.02, rel=0.05)
    assert other.predict((1.0, 5.0)) == pytest.approx(0.02, rel=0.05)
