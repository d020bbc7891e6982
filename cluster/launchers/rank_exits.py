"""Which rank ended an instance, of those that the launcher saw end. Pure.

When one rank ends, the others end because of it, often before the launcher looks again. Of those seen ended at once,
the cause is one that was killed (the others noticed and ended by themselves), else the driver, whose last words name
the rank that it lost, else one that failed, else the first by number. What ends later is a consequence.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum

__all__ = ["EndKind", "RankEnd", "cause_of", "cause_text"]


class EndKind(IntEnum):
    """How a rank ended, the likelier cause first."""

    KILLED = 0
    FAILED = 1
    STOPPED = 2


@dataclass(frozen=True, slots=True)
class RankEnd:
    """One rank that has ended; `how` completes "rank 1 ..."."""

    rank: int
    kind: EndKind
    how: str


def cause_of(ends: Iterable[RankEnd], *, driver_rank: int) -> RankEnd:
    """The likeliest cause among the ranks that were seen ended at one look."""
    return min(ends, key=lambda end: (end.kind, end.rank != driver_rank, end.rank))


def cause_text(cause: RankEnd, *, num_ranks: int) -> str:
    """What is told of the instance's end; the rank is named where there are several."""
    return cause.how if num_ranks == 1 else f"rank {cause.rank} {cause.how}"
