"""Which batch sizes of decode steps have a CUDA graph, and which of these serves a batch. Pure.

A graph is recorded for one number of rows; a smaller batch is filled up with padding rows, which compute something that
nobody reads. Steps between sizes bound the waste: 1, 2, 4, then by 8 up to 128, by 16 up to 256, by 32 up to 512.
Beyond that a step takes so long that launching its kernels one by one does not show.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable

__all__ = ["GraphBuckets"]

_SMALL = (1, 2, 4)
_RANGES = ((8, 128, 8), (128, 256, 16), (256, 512, 32))


class GraphBuckets:
    """Numbers of rows, ascending.

    Args:
        sizes: at least 1 each; none at all: every batch runs without a graph.
    """

    def __init__(self, sizes: Iterable[int]) -> None:
        self.sizes = tuple(sorted(set(sizes)))
        assert not self.sizes or self.sizes[0] >= 1

    @classmethod
    def up_to(cls, max_batch_size: int) -> GraphBuckets:
        """The usual sizes up to `max_batch_size`, which is the last of them unless it is beyond all."""
        usual = [*_SMALL, *(size for begin, end, step in _RANGES for size in range(begin, end + 1, step))]
        sizes = [size for size in usual if size < max_batch_size]
        if max_batch_size <= usual[-1]:
            sizes.append(max_batch_size)
        return cls(sizes)

    @property
    def largest(self) -> int:
        """The largest size; 0 where there is none."""
        return self.sizes[-1] if self.sizes else 0

    @property
    def capture_order(self) -> tuple[int, ...]:
        """Largest first: what it leaves of the memory pool serves all others."""
        return self.sizes[::-1]

    def of(self, num_rows: int) -> int | None:
        """The smallest size that holds `num_rows`; None: no graph does."""
        assert num_rows >= 1
        index = bisect.bisect_left(self.sizes, num_rows)
        return self.sizes[index] if index < len(self.sizes) else None
