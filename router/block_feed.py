"""Whether what a worker's stream says of its blocks is complete: pure, time is an argument.

                 opened                    last part of a snapshot
    UNKNOWN -----------------> RESYNCING ---------------------------> SYNCED
                                 ^  |  ^------------------------------' | a gap in the numbers, or the stream closed
                                 |  | for more than `stale_after_s`     |
       (a snapshot that begins)  |  v                                   |
                                STALE <---------------------------------'  events that cannot be taken

What was known stays in use while RESYNCING: a cache does not vanish with a stream. STALE says that nobody knows any
more how true it is.
"""

from __future__ import annotations

import enum

from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["STALE_AFTER_S", "BlockFeed", "Freshness", "Verdict"]

STALE_AFTER_S = 3.0


class Freshness(enum.Enum):
    """See the chart above."""

    UNKNOWN = "unknown"
    SYNCED = "synced"
    RESYNCING = "resyncing"
    STALE = "stale"


class Verdict(enum.Enum):
    """What to do with a batch of events."""

    APPLY = "apply"
    BEGIN_SNAPSHOT = "begin snapshot"
    IGNORE = "ignore"
    ASK = "ask"
    """Ignore it, and ask for a snapshot: something was missed."""


class BlockFeed:
    """One stream after another from one incarnation of a worker.

    Args:
        stale_after_s: how long it may be out of sync before it is STALE.

    Attributes:
        freshness: see the chart.
        reason: why it is not SYNCED, in words.
    """

    __slots__ = ("_is_told", "_parts_of", "_seq", "_since_s", "_stale_after_s", "freshness", "reason")

    def __init__(self, stale_after_s: float = STALE_AFTER_S) -> None:
        self.freshness = Freshness.UNKNOWN
        self.reason = "it has not been heard of"
        self._stale_after_s = stale_after_s
        self._since_s = 0.0
        self._is_told = False
        self._seq: int | None = None
        self._parts_of: int | None = None  # the snapshot whose parts are coming

    def opened(self, now_s: float) -> None:
        """A stream has begun, and with it a snapshot will come."""
        self._lose(now_s, "its snapshot is awaited")

    def closed(self, now_s: float) -> None:
        """The stream has ended."""
        self._lose(now_s, "its stream is down")

    def refuse(self, reason: str) -> None:
        """What it says cannot be taken; only another snapshot mends that."""
        self._seq = self._parts_of = None
        self.freshness, self.reason = Freshness.STALE, reason

    def accept(self, events: pb.BlockEvents, now_s: float) -> Verdict:
        """Judges the next batch."""
        if events.snapshot:
            verdict = Verdict.APPLY if self._parts_of == events.seq else Verdict.BEGIN_SNAPSHOT
            self._parts_of = events.seq if events.more else None
            if not events.more:
                self._seq = events.seq
                self.freshness, self.reason, self._is_told = Freshness.SYNCED, "", False
            return verdict
        if self._seq is None or events.seq <= self._seq:
            return Verdict.IGNORE
        if events.seq == self._seq + 1:
            self._seq = events.seq
            return Verdict.APPLY
        self._lose(now_s, f"batches {self._seq + 1} to {events.seq - 1} were missed")
        return Verdict.ASK

    def look(self, now_s: float) -> bool:
        """Whether it is STALE, told once until it is SYNCED again."""
        if self.freshness is Freshness.RESYNCING and now_s - self._since_s > self._stale_after_s:
            self.freshness = Freshness.STALE
        is_news = self.freshness is Freshness.STALE and not self._is_told
        self._is_told = self._is_told or is_news
        return is_news

    def _lose(self, now_s: float, reason: str) -> None:
        self._seq = self._parts_of = None
        self.reason = reason
        if self.freshness in (Freshness.UNKNOWN, Freshness.SYNCED):
            self.freshness, self._since_s = Freshness.RESYNCING, now_s
