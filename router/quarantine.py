"""Which request is to blame for workers that die: pure.

A worker that is lost while it begins a request (before it has decoded a token of it) may have been killed by it. A
request that has begun on two of them is *suspected*. A worker that only fell silent may as well be stopped, or cut off,
so silence counts half: four silent workers are needed where two dead ones are enough. Then, after a moment in which a
worker that only its connection was lost to would have come back:

    some of them live after all, too few are left            FREE     it goes on as any other
    no other request began on the same two                   GUILTY   refused for good
    another one did                                          ALONE    they cannot be told apart: each goes on by itself,
                                                                      one at a time; who loses a worker then is GUILTY

So an innocent neighbour is never refused, and one poisonous request costs two workers, or three in bad company.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

__all__ = ["MAX_LOSSES", "PROVEN_TOKENS", "Quarantine", "Verdict"]

MAX_LOSSES = 2
PROVEN_TOKENS = 2
"""So many tokens of one attempt clear a request: the first comes from the prompt's step, the second was decoded."""
_MAX_REMEMBERED = 4096
_DEATH, _SILENCE = 2, 1


class Verdict(Enum):
    """What becomes of a request whose attempt broke."""

    FREE = "free"
    ALONE = "alone"
    GUILTY = "guilty"


@dataclass(slots=True)
class _Record:
    """`losses`: incarnations lost, and what each counts; `by_itself`: the last of them while the request was alone."""

    losses: dict[bytes, int] = field(default_factory=dict)
    by_itself: bool = False

    @property
    def is_heavy(self) -> bool:
        """Whether they make a suspicion."""
        return sum(self.losses.values()) >= MAX_LOSSES * _DEATH


class Quarantine:
    """The requests of one router that workers were lost with. Forgets the oldest, beyond some thousands."""

    def __init__(self) -> None:
        self._records: OrderedDict[str, _Record] = OrderedDict()
        self._alone: str | None = None

    def lost(self, request: str, worker: bytes, *, is_silent: bool = False) -> None:
        """The worker of this incarnation was lost, or fell silent, while it began `request`."""
        record = self._records.setdefault(request, _Record())
        record.losses[worker] = max(record.losses.get(worker, 0), _SILENCE if is_silent else _DEATH)
        record.by_itself = self._alone == request
        self._records.move_to_end(request)
        while len(self._records) > _MAX_REMEMBERED:
            self._records.popitem(last=False)

    def proven(self, request: str) -> None:
        """A worker has decoded a token of it and lives."""
        self._records.pop(request, None)
        self.leave(request)

    def is_suspected(self, request: str) -> bool:
        """Whether `request` must be judged before it is tried again."""
        record = self._records.get(request)
        return record is not None and record.is_heavy

    def judge(self, request: str, is_alive: Callable[[bytes], bool]) -> Verdict:
        """What becomes of `request`, a moment after its attempt broke."""
        record = self._records.get(request)
        if record is None:
            return Verdict.FREE
        record.losses = {worker: counts for worker, counts in record.losses.items() if not is_alive(worker)}
        if not record.is_heavy:
            return Verdict.FREE
        if record.by_itself:
            return Verdict.GUILTY
        others = (other for name, other in self._records.items() if name != request)
        in_company = any(len(record.losses.keys() & other.losses.keys()) >= MAX_LOSSES for other in others)
        return Verdict.ALONE if in_company else Verdict.GUILTY

    def enter(self, request: str) -> bool:
        """Whether `request` may go on by itself now; one at a time, until `leave`."""
        if self._alone in (None, request):
            self._alone = request
            return True
        return False

    def leave(self, request: str) -> None:
        """`request` is no longer by itself."""
        if self._alone == request:
            self._alone = None
