"""What was decided for the last requests, and from what: pure. A ring that drops the oldest.

record(engine id, attempt, decision, now_s)     for every attempt, at no cost: the decision is kept as it is
find(public id or engine id)                    every choice and attempt; only what is asked for is ever turned
                                                into words
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from baton.router.request_ids import split_engine_id

__all__ = ["Decisions", "Explained", "Found", "Recorded"]

MAX_KEPT = 1024
"""Decisions that one router keeps: 6 KB each with two workers, 15 with sixteen."""
MAX_TOLD = 256
"""Decisions told at once about one request."""


class Explained(Protocol):
    """A decision that can say how it came about."""

    def as_dict(self) -> Mapping[str, Any]:
        """As JSON: candidates, scores, the chosen ones, and why."""
        ...


@dataclass(slots=True)
class Recorded:
    """One decision. `at_s` is on the recorder's clock."""

    engine_id: str
    attempt: int
    at_s: float
    decision: Explained

    def as_dict(self, now_s: float) -> dict[str, Any]:
        """As JSON, with its age."""
        return {
            "unique_id": self.engine_id,
            "choice": split_engine_id(self.engine_id)[2],
            "attempt": self.attempt,
            "age_s": round(max(now_s - self.at_s, 0.0), 3),
            "decision": dict(self.decision.as_dict()),
        }


@dataclass(frozen=True, slots=True)
class Found:
    """Decisions of one request, in the order in which they were made.

    Attributes:
        left_out: older ones that are not told.
        namesakes: older requests with the same public id that are still kept.
    """

    decisions: tuple[Recorded, ...] = ()
    left_out: int = 0
    namesakes: int = 0


class Decisions:
    """The last `max_kept` decisions of one router, found by the requests' public ids."""

    def __init__(self, max_kept: int = MAX_KEPT) -> None:
        assert max_kept > 0, max_kept
        self.max_kept = max_kept
        self._ring: deque[tuple[str, Recorded]] = deque()
        self._by_id: dict[str, list[Recorded]] = {}

    def __len__(self) -> int:
        return len(self._ring)

    def record(self, engine_id: str, attempt: int, decision: Explained, now_s: float) -> None:
        """Keep what was decided for an attempt of one choice."""
        public_id = split_engine_id(engine_id)[0]
        recorded = Recorded(engine_id, attempt, now_s, decision)
        self._ring.append((public_id, recorded))
        known = self._by_id.get(public_id)
        if known is None:
            self._by_id[public_id] = [recorded]
        else:
            known.append(recorded)
        if len(self._ring) > self.max_kept:
            self._drop_oldest()

    def find(self, request_id: str) -> Found:
        """Choices and attempts of the newest request with this public id, or the one choice with this engine id."""
        kept = self._by_id.get(request_id)
        if kept is not None:
            requests = list(dict.fromkeys(split_engine_id(recorded.engine_id)[1] for recorded in kept))
            matching = [recorded for recorded in kept if split_engine_id(recorded.engine_id)[1] == requests[-1]]
            return Found(tuple(matching[-MAX_TOLD:]), max(len(matching) - MAX_TOLD, 0), len(requests) - 1)
        kept = self._by_id.get(request_id.rsplit("-", 2)[0], [])
        matching = [recorded for recorded in kept if recorded.engine_id == request_id]
        return Found(tuple(matching[-MAX_TOLD:]), max(len(matching) - MAX_TOLD, 0))

    def oldest_s(self) -> float | None:
        """When the oldest kept one was recorded; None: nothing is kept."""
        return self._ring[0][1].at_s if self._ring else None

    def _drop_oldest(self) -> None:
        public_id, oldest = self._ring.popleft()
        kept = self._by_id[public_id]
        dropped = kept.pop(0)
        assert dropped is oldest, public_id
        if not kept:
            del self._by_id[public_id]
