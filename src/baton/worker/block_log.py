"""What a worker tells of its blocks, numbered: pure. One log, and a reader for each router, at its own pace.

    append(change) --> batches seq 1, 2, 3 ... the last ones kept --> reader.next(): the next batch
                  `--> held: all keys                             `-> or, for who comes late, the parts of a snapshot

A reader holds no events of its own: who does not read for long has, when it reads again, a snapshot to read instead of
what is no longer kept. So neither many routers nor slow ones make a heap.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from itertools import islice

from baton.engine.block_journal import BlockChange
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["BlockLog", "BlockReader"]

_MAX_BATCH_KEYS = 1024
_MAX_KEPT_KEYS = 65_536
_BATCH_COST_KEYS = 32  # that a batch without keys counts as


class BlockLog:
    """The log of one incarnation of one worker.

    Args:
        max_batch_keys: in one batch, or one part of a snapshot.
        max_kept_keys: in the batches kept for readers.

    Attributes:
        held: the keys of all blocks that the worker holds.
        seq: of the last batch.
    """

    def __init__(self, *, max_batch_keys: int = _MAX_BATCH_KEYS, max_kept_keys: int = _MAX_KEPT_KEYS) -> None:
        assert 0 < max_batch_keys <= max_kept_keys
        self.held: set[int] = set()
        self.seq = 0
        self.max_batch_keys = max_batch_keys
        self._max_kept_keys = max_kept_keys
        self._kept: deque[pb.BlockEvents] = deque()
        self._kept_keys = 0

    def append(self, change: BlockChange) -> None:
        """The worker's blocks have changed."""
        if not change:
            return
        change.apply(self.held)
        for batch in self._batches(change):
            self._kept.append(batch)
            self._kept_keys += _cost(batch)
        while self._kept_keys > self._max_kept_keys and len(self._kept) > 1:
            self._kept_keys -= _cost(self._kept.popleft())

    def after(self, seq: int) -> pb.BlockEvents | None:
        """The batch behind `seq`, which must not be the last; None where it is no longer kept."""
        assert seq < self.seq, (seq, self.seq)
        place = seq - (self.seq - len(self._kept))
        return self._kept[place] if place >= 0 else None

    def _batches(self, change: BlockChange) -> Iterator[pb.BlockEvents]:
        """Removals first: a key is told as removed and as stored where two names share it."""
        size, stored, removed = self.max_batch_keys, iter(change.stored), iter(change.removed)
        cleared = change.cleared
        while True:
            gone = list(islice(removed, size))
            come = list(islice(stored, size - len(gone)))
            if not (gone or come or cleared):
                return
            self.seq += 1
            yield pb.BlockEvents(seq=self.seq, tier=pb.DEVICE, stored=come, removed=gone, cleared=cleared)
            cleared = False


class BlockReader:
    """How far one router has read; it begins with a snapshot."""

    def __init__(self, log: BlockLog) -> None:
        self._log = log
        self._seq: int | None = None
        self._snapshot: Iterator[pb.BlockEvents] | None = None

    @property
    def has_more(self) -> bool:
        """Whether `next` has something."""
        return self._snapshot is not None or self._seq is None or self._seq < self._log.seq

    def restart(self) -> None:
        """Begin with a snapshot again."""
        self._seq = self._snapshot = None

    def next(self) -> pb.BlockEvents | None:
        """The next batch, or part of a snapshot; None: there is nothing new."""
        if not self.has_more:
            return None
        if self._snapshot is None and self._seq is not None:
            batch = self._log.after(self._seq)
            if batch is not None:
                self._seq = batch.seq
                return batch
        if self._snapshot is None:
            self._snapshot = self._parts(list(self._log.held), self._log.seq)
        part = next(self._snapshot)
        if not part.more:
            self._seq, self._snapshot = part.seq, None
        return part

    def _parts(self, keys: list[int], seq: int) -> Iterator[pb.BlockEvents]:
        size = self._log.max_batch_keys
        for start in range(0, max(len(keys), 1), size):
            yield pb.BlockEvents(
                seq=seq, snapshot=True, more=start + size < len(keys), tier=pb.DEVICE, stored=keys[start : start + size]
            )


def _cost(batch: pb.BlockEvents) -> int:
    return len(batch.stored) + len(batch.removed) + _BATCH_COST_KEYS
