"""Where the pages of one request come from, as its decode worker decides it: pure.

    EXPECTED --landed--------------------------------------------------------------> LANDED
    EXPECTED --failed here, out of time, nobody else comes, no word of the router--> LOCAL      computed here
    EXPECTED, LOCAL --cancelled----------------------------------------------------> CANCELLED

In EXPECTED prefill workers try one after another, each under a handover number of its own, counted up by the router:

    reserved             Open(0)                      the blocks are the request's for all tries
    prefill_failed(n)    Cancel(the one before)       its sender may still be writing
    settled              Open(n)                      nobody writes any more
    failed by the peer   AwaitWord                    the router learns of it too, and says who comes next, or nobody

The blocks go to the engine (`PrefillHere`, `Release`) only while no reservation of them is open.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass

from baton.kv_transfer.handover import Fail

__all__ = ["Action", "AwaitWord", "Cancel", "Open", "Phase", "PrefillHere", "Release", "RemotePrefill"]


@dataclass(frozen=True, slots=True)
class Open:
    """Open a reservation of the blocks on every rank, under this number."""

    handover: int


@dataclass(frozen=True, slots=True)
class Cancel:
    """Give the reservation of this number up, or refuse whoever comes for it."""

    handover: int
    reason: str


@dataclass(frozen=True, slots=True)
class AwaitWord:
    """Report `no_word` of this number soon, unless something else happens before."""

    handover: int


@dataclass(frozen=True, slots=True)
class PrefillHere:
    """Have the engine compute the prompt. With `if_waiting` only where it has not reserved blocks meanwhile."""

    if_waiting: bool = False


@dataclass(frozen=True, slots=True)
class Release:
    """Have the engine free the blocks, and tell the end."""


Action = Open | Cancel | AwaitWord | PrefillHere | Release
Actions = tuple[Action, ...]


class Phase(enum.StrEnum):
    """What is decided."""

    EXPECTED = "EXPECTED"
    LANDED = "LANDED"
    LOCAL = "LOCAL"
    CANCELLED = "CANCELLED"


class RemotePrefill:
    """One request whose prompt a prefill worker is to compute.

    Attributes:
        phase: what is decided.
        reason: why it is LOCAL or CANCELLED.
        handover: number of the prefill worker's try that is expected, or was the last.
    """

    def __init__(self) -> None:
        self.phase = Phase.EXPECTED
        self.reason = ""
        self.handover = 0
        self._open: int | None = None
        self._has_blocks = False
        self._awaits_word = False

    @property
    def is_expected(self) -> bool:
        """Nothing is decided yet."""
        return self.phase is Phase.EXPECTED

    # ---------------------------------------------------------------- events

    def reserved(self) -> Actions:
        """The engine has blocks for the request."""
        self._has_blocks = True
        if self.phase is Phase.LOCAL:
            return (PrefillHere(),)
        if not self.is_expected:
            return ()
        self._open = self.handover
        return (Open(self.handover),)

    def prefill_failed(self, reason: str, next_handover: int) -> Actions:
        """The router says that the present prefill worker has failed, and who comes next (0: nobody)."""
        if not self.is_expected:
            return (Cancel(next_handover, self.reason or "the pages have landed"),) if next_handover else ()
        if not next_handover:
            return self._local(reason)
        if next_handover <= self.handover:
            return ()
        before, self.handover, self._awaits_word = self.handover, next_handover, False
        if self._has_blocks and self._open is None:
            self._open = next_handover
            return (Open(next_handover),)
        return (Cancel(before, reason),)

    def no_word(self, handover: int) -> Actions:
        """The router has not said who comes after the try of this number."""
        if not self._awaits_word or handover != self.handover:
            return ()
        return self._local(self.reason)

    def out_of_time(self, reason: str) -> Actions:
        """All tries together have taken too long."""
        return self._local(reason)

    def cancelled(self, reason: str) -> Actions:
        """The request is to end."""
        if self.phase is Phase.CANCELLED:
            return ()
        was, self.phase, self.reason = self.phase, Phase.CANCELLED, reason
        if self._open is not None:
            return (Cancel(self._open, reason), *self._refuse_next(reason))
        return (Cancel(self.handover, reason), Release()) if was is Phase.EXPECTED else (Release(),)

    def landed(self, handover: int) -> None:
        """All pages are here. Says nothing when a cancel came first."""
        if self.is_expected and handover == self.handover:
            self.phase = Phase.LANDED
            self._open = None

    def failed(self, handover: int, failure: Fail) -> Actions:
        """A reservation has failed, on whatever rank first; it settles later."""
        if not self.is_expected or handover != self.handover:
            return ()
        if failure.by_peer:
            self.reason, self._awaits_word = failure.reason, True
            return (AwaitWord(handover),)
        self.phase, self.reason = Phase.LOCAL, failure.reason
        return ()

    def settled(self, handover: int) -> Actions:
        """Nothing writes into the blocks for this reservation any more."""
        if self._open != handover:
            return ()
        self._open = None
        match self.phase:
            case Phase.CANCELLED:
                return (Release(),)
            case Phase.LOCAL:
                return (PrefillHere(),)
            case Phase.EXPECTED if handover < self.handover:
                self._open = self.handover
                return (Open(self.handover),)
        return ()

    # ---------------------------------------------------------------- inner

    def _local(self, reason: str) -> Actions:
        if not self.is_expected:
            return ()
        self.phase, self.reason, self._awaits_word = Phase.LOCAL, reason, False
        if self._open is not None:
            return (Cancel(self._open, reason), *self._refuse_next(reason))
        return (Cancel(self.handover, reason), PrefillHere(if_waiting=not self._has_blocks))

    def _refuse_next(self, reason: str) -> Actions:
        """The next try waits for the present one to settle, and its sender may be waiting for its ticket."""
        return (Cancel(self.handover, reason),) if self._open != self.handover else ()
