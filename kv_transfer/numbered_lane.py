"""The messages of a link's lane, numbered like those of its stream: one that is lost, or comes twice, is noticed.

The lane itself loses nothing. What may stand between the two sides does (faults on purpose, see `faulty_lane.py`), and
a link whose lost offer nobody misses would hold its reservation for a lease.
"""

from __future__ import annotations

import threading
from typing import TypeVar

from baton.kv_transfer.transports.lane import Lane
from baton.proto.baton.v1 import worker_pb2
from baton.proto.stream_order import StreamOrder

__all__ = ["NumberedLane"]

MessageT = TypeVar("MessageT", worker_pb2.ShipMessage, worker_pb2.ShipReply)


class NumberedLane:
    """One side of a lane. `send` is for any thread, `receive` and `is_new` are for the one that reads."""

    def __init__(self, lane: Lane) -> None:
        self._lane = lane
        self._lock = threading.Lock()
        self._num_sent = 0
        self._received = StreamOrder()

    def fileno(self) -> int:
        """See `Lane`."""
        return self._lane.fileno()

    def send(self, message: MessageT) -> bool:
        """Number a message and hand it over; False says that it must go another way. Never blocks for long."""
        with self._lock:
            message.seq = self._num_sent + 1
            is_sent = self._lane.send(message.SerializeToString())
            self._num_sent += is_sent
        return is_sent

    def receive(self, *, wait: bool) -> bytes | None:
        """See `Lane`."""
        return self._lane.receive(wait=wait)

    def is_new(self, seq: int) -> bool:
        """Whether the message of this number has not come before.

        Raises:
            SequenceGapError: one is missing before it.
        """
        return self._received.accept(seq)
