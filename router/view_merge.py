"""One view of the instances out of several lists of them: pure; time is an argument.

The controller's registry and the shared state both list the cluster, and either may be away, behind, or have just
begun and know little. The view takes from both:

    here      an instance is in the view if either source has it
    newest    where a source names another incarnation than before, the earlier one is over, for both sources
    dead      an incarnation that either source calls dead is over at once, for good
    away      while one source is away, the other serves: what only the absent one knew goes when the other has listed
              everything for a lease; while both are away nothing goes
    partial   a list that cannot know everybody removes nobody
    linger    what is missing in a source's lists counts for another `linger_s`: after Redis lost its data everybody is
              back within a third of the lease

A registry may speak for an instance that has not announced itself, without an incarnation: such a placeholder is in
the view only where nobody knows the instance, and called dead it ends the incarnation that this very registry named
before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["Source", "ViewMerge"]

_ENDED_LIMIT = 4096
_LIFE = ("starting", "ready", "draining")
"""States in the order in which an incarnation goes through them."""

_Weight = tuple[bool, bool, bool, int]


@dataclass(slots=True)
class _Entry:
    status: pb.WorkerStatus
    missing_since_s: float | None = None


@dataclass(slots=True)
class Source:
    """What one source said.

    Attributes:
        linger_s: how long an instance counts after the lists have ceased to name it.
        named: the last incarnation of each instance that the present process behind this source has named.
        full_since_s: since when its lists are full ones, without a break; None while they are not.
        away_since_s: since when it does not answer; None while it does.
    """

    linger_s: float = 0.0
    entries: dict[str, _Entry] = field(default_factory=dict)
    named: dict[str, bytes] = field(default_factory=dict)
    author: bytes = b""
    full_since_s: float | None = None
    away_since_s: float | None = 0.0


class ViewMerge:
    """Merges the lists of `sources`, the more trustworthy first.

    Args:
        lease_s: how long an announcement holds, in every source.
    """

    def __init__(self, sources: Iterable[Source], *, lease_s: float) -> None:
        self.sources = list(sources)
        self._lease_s = lease_s
        self._last: dict[str, bytes] = {}
        self._ended: set[tuple[str, bytes]] = set()
        self._ended_order: deque[tuple[str, bytes]] = deque()

    def heard(
        self,
        source: Source,
        statuses: Iterable[pb.WorkerStatus],
        now_s: float,
        *,
        is_partial: bool = False,
        author: bytes = b"",
    ) -> None:
        """A list came.

        Args:
            is_partial: it does not know everybody.
            author: incarnation of the process that wrote it.
        """
        source.away_since_s = None
        if is_partial:
            source.full_since_s = None
        elif source.full_since_s is None:
            source.full_since_s = now_s
        if author != source.author:
            source.author, source.named = author, {}
        seen: set[str] = set()
        for status in statuses:
            if status.state == "dead":
                self._end(status.instance_id, status.incarnation or source.named.get(status.instance_id, b""))
            elif status.instance_id not in seen and self._take(source, status):
                seen.add(status.instance_id)
        if not is_partial:
            _miss(source, seen, now_s)

    def lost(self, source: Source, now_s: float) -> None:
        """The source does not answer."""
        source.full_since_s = None
        if source.away_since_s is None:
            source.away_since_s = now_s

    def view(self, now_s: float) -> list[pb.WorkerStatus]:
        """Every instance, none of them dead, at most one incarnation of each; what is over is forgotten."""
        for source in self.sources:
            if self._is_succeeded(source, now_s):
                source.entries.clear()
        chosen: dict[str, tuple[_Weight, pb.WorkerStatus]] = {}
        for rank, source in enumerate(self.sources):
            for instance_id, entry in source.entries.items():
                status = entry.status
                if (instance_id, status.incarnation) in self._ended:
                    continue
                # An incarnation beats a placeholder; who answers beats who is away; what is in the view stays while
                # nobody answers; else the order of the sources.
                answers = source.away_since_s is None
                stays = not answers and self._last.get(instance_id) == status.incarnation
                weight = (status.incarnation != b"", answers, stays, -rank)
                other = chosen.get(instance_id)
                if other is None:
                    chosen[instance_id] = weight, status
                elif other[1].incarnation == status.incarnation:
                    chosen[instance_id] = max(weight, other[0]), _later(other, (weight, status))
                elif weight > other[0]:
                    chosen[instance_id] = weight, status
        self._last = {instance_id: status.incarnation for instance_id, (_, status) in chosen.items()}
        return [status for _, status in chosen.values()]

    def _take(self, source: Source, status: pb.WorkerStatus) -> bool:
        """Whether the list names an instance by this that is not over."""
        instance_id, incarnation = status.instance_id, status.incarnation
        entry = source.entries.get(instance_id)
        if not incarnation:
            if entry is not None and entry.status.incarnation:
                return False
            source.entries[instance_id] = _Entry(status)
            return True
        if (instance_id, incarnation) in self._ended:
            return False
        for earlier in (source.named.get(instance_id, b""), entry.status.incarnation if entry is not None else b""):
            if earlier != incarnation:
                self._end(instance_id, earlier)
        source.entries[instance_id] = _Entry(status)
        source.named[instance_id] = incarnation
        return True

    def _end(self, instance_id: str, incarnation: bytes) -> None:
        if not incarnation or (instance_id, incarnation) in self._ended:
            return
        self._ended.add((instance_id, incarnation))
        self._ended_order.append((instance_id, incarnation))
        if len(self._ended_order) > _ENDED_LIMIT:
            self._ended.discard(self._ended_order.popleft())
        for source in self.sources:
            entry = source.entries.get(instance_id)
            if entry is not None and entry.status.incarnation == incarnation:
                del source.entries[instance_id]

    def _is_succeeded(self, source: Source, now_s: float) -> bool:
        """Whether it is away, and another source has had the time to hear of everybody since."""
        away_since_s = source.away_since_s
        return away_since_s is not None and any(
            other.full_since_s is not None and now_s - max(other.full_since_s, away_since_s) >= self._lease_s
            for other in self.sources
            if other is not source
        )


def _miss(source: Source, seen: set[str], now_s: float) -> None:
    """Drop what a full list has not named for `linger_s`."""
    for instance_id, entry in list(source.entries.items()):
        if instance_id in seen:
            entry.missing_since_s = None
            continue
        if entry.missing_since_s is None:
            entry.missing_since_s = now_s
        if now_s - entry.missing_since_s >= source.linger_s:
            del source.entries[instance_id]


def _later(one: tuple[_Weight, pb.WorkerStatus], other: tuple[_Weight, pb.WorkerStatus]) -> pb.WorkerStatus:
    """Of two statuses of one incarnation, that which is further in its life; else the less trusted source's.

    The registry tells changes, the shared state is read every second: its loads are the fresher ones.
    """

    def place(each: tuple[_Weight, pb.WorkerStatus]) -> tuple[int, bool, int]:
        (_, answers, _, trust), status = each
        return _LIFE.index(status.state) if status.state in _LIFE else -1, answers, -trust

    return max(one, other, key=place)[1]
