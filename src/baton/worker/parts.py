"""How the parts of one handover end, one part per rank of the instance: pure.

    every part   open --landed--> landed --settled--> settled          decode: pages are here; prefill: not used
                 open --failed--> failed --settled--> settled
    the whole    is done well when all have landed, fails with the first part that fails, is over when all have settled

Each event is answered once with "this one decided it", so that whoever holds the parts acts exactly once.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = ["Parts"]


class Parts:
    """The parts of one handover.

    Args:
        ranks: of the instance.

    Attributes:
        failure: why the whole failed; empty while it has not.
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        self.failure = ""
        self._ranks = frozenset(ranks)
        self._landed: set[int] = set()
        self._settled: set[int] = set()
        assert self._ranks, "an instance has a rank"

    @property
    def have_landed(self) -> bool:
        """Whether every rank's pages are here."""
        return self._landed == self._ranks

    @property
    def have_settled(self) -> bool:
        """Whether nothing touches the blocks any more, on any rank."""
        return self._settled == self._ranks

    def landed(self, rank: int) -> bool:
        """A rank's pages are here. True when they were the last that was missed, and nothing has failed."""
        self._check(rank)
        assert rank not in self._landed, f"rank {rank} landed twice"
        self._landed.add(rank)
        return self.have_landed and not self.failure

    def failed(self, rank: int, reason: str) -> bool:
        """A rank's part failed. True for the first of them."""
        self._check(rank)
        if self.failure:
            return False
        self.failure = reason if len(self._ranks) == 1 else f"rank {rank}: {reason}"
        return True

    def settled(self, rank: int) -> bool:
        """Nothing touches a rank's blocks any more. True when it was the last."""
        self._check(rank)
        assert rank not in self._settled, f"rank {rank} settled twice"
        self._settled.add(rank)
        return self.have_settled

    def _check(self, rank: int) -> None:
        assert rank in self._ranks, f"rank {rank} is none of {sorted(self._ranks)}"
