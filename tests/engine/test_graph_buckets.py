"""Which recorded batch size serves a batch."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.graph_buckets import GraphBuckets


@pytest.mark.parametrize(
    ("max_batch_size", "sizes"),
    [
        (1, (1,)),
        (3, (1, 2, 3)),
        (8, (1, 2, 4, 8)),
        (20, (1, 2, 4, 8, 16, 20)),
    ],
)
def test_small_batches(max_batch_size: int, sizes: tuple[int, ...]) -> None:
    buckets = GraphBuckets.up_to(max_batch_size)
    assert buckets.sizes == sizes
    assert buckets.capture_order == sizes[::-1]
    assert buckets.largest == max_batch_size


@given(st.integers(1, 2000), st.integers(1, 2000))
def test_the_smallest_that_fits(max_batch_size: int, num_rows: int) -> None:
    buckets = GraphBuckets.up_to(max_batch_size)
    assert buckets.largest == min(max_batch_size, 512)
    found = buckets.of(num_rows)
    if num_rows > buckets.largest:
        assert found is None
    else:
        assert found == min(size for size in buckets.sizes if size >= num_rows)
        assert found <= max(4, num_rows + 7, 1.125 * num_rows + 1), "too much padding"
    assert len(buckets.sizes) <= 40


def test_none_at_all() -> None:
    assert GraphBuckets(()).of(1) is None
    assert GraphBuckets(()).largest == 0
