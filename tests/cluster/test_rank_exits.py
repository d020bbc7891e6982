"""Which rank is named as the cause of an instance's end."""

from __future__ import annotations

import pytest

from baton.cluster.launchers.rank_exits import EndKind, RankEnd, cause_of, cause_text


@pytest.mark.parametrize(
    ("ends", "cause"),
    [
        ([(0, EndKind.FAILED), (3, EndKind.KILLED)], 3),
        ([(3, EndKind.KILLED), (1, EndKind.KILLED)], 1),
        ([(0, EndKind.FAILED), (2, EndKind.FAILED)], 2),
        ([(2, EndKind.STOPPED), (1, EndKind.FAILED)], 1),
        ([(3, EndKind.STOPPED)], 3),
    ],
)
def test_killed_before_driver_before_failed_before_stopped(ends: list[tuple[int, EndKind]], cause: int) -> None:
    found = cause_of([RankEnd(rank, kind, "ended") for rank, kind in ends], driver_rank=2)
    assert found.rank == cause


def test_the_rank_is_named_where_there_are_several() -> None:
    end = RankEnd(1, EndKind.KILLED, "was killed by SIGKILL")
    assert cause_text(end, num_ranks=4) == "rank 1 was killed by SIGKILL"
    assert cause_text(end, num_ranks=1) == "was killed by SIGKILL"
