"""A lane on which messages go wrong: two threads between the link and the real lane carry them, one for each direction.

    link <-> Lane <-socket pair-> [rules of rpc.send | rpc.receive for Handover.Ship] <-> the real Lane

So the link holds a lane like any other, on which what waits for a rule can wait. The two end together.
"""

from __future__ import annotations

import select
import socket
import threading
from collections.abc import Sequence

from baton import faults
from baton.kv_transfer.transports.lane import Lane

__all__ = ["faulty_lane"]

_METHOD = "Handover.Ship"
_FULL_WAIT_S = 0.05


def faulty_lane(inner: Lane | None, peer: str) -> Lane | None:
    """The lane to use in the place of `inner`, which it closes with itself; None where there is none."""
    if inner is None:
        return None
    mine, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    between = Lane(theirs)
    ended = threading.Event()
    for source, sink, point in ((between, inner, "rpc.send"), (inner, between, "rpc.receive")):
        direction = _Direction(source, sink, point, peer, ended)
        threading.Thread(target=direction.run, name=f"baton-faulty-{point}", daemon=True).start()
    return Lane(mine)


class _Direction:
    def __init__(self, source: Lane, sink: Lane, point: str, peer: str, ended: threading.Event) -> None:
        self._source = source
        self._sink = sink
        self._point = point
        self._peer = peer
        self._ended = ended
        self._is_dead = False

    def run(self) -> None:
        """Carries messages until one of the two lanes ends, or a fault ends both."""
        try:
            while not self._ended.is_set() and (message := self._source.receive(wait=True)):
                for changed in self._carry(message):
                    self._send(changed)
        except (faults.FaultError, OSError, ValueError):
            pass  # a fault says that the lane breaks, or it was closed while it was full
        finally:
            self._ended.set()
            self._source.close()
            self._sink.close()

    def _carry(self, message: bytes) -> Sequence[bytes]:
        if self._is_dead or faults.active is None:
            return () if self._is_dead else (message,)
        messages: tuple[bytes, ...] = (message,)
        for fault in faults.active.decide(self._point, peer=self._peer, method=_METHOD):
            rule = fault.rule
            match rule.action:
                case "kill" | "fail":
                    faults.act(fault)
                case "hang" | "delay":
                    faults.note(fault)
                    self._ended.wait(rule.for_s)
                case "slow":
                    assert rule.rate_bytes_s is not None
                    self._ended.wait(len(message) / rule.rate_bytes_s)
                case "drop" | "blackhole":
                    faults.note(fault)
                    self._is_dead = rule.action == "blackhole"
                    return ()
                case "duplicate":
                    faults.note(fault)
                    messages *= 2
                case "truncate" | "flip":
                    faults.note(fault)
                    messages = tuple(fault.damaged(message) for message in messages)
        return messages

    def _send(self, message: bytes) -> None:
        while message and not self._ended.is_set() and not self._sink.send(message):
            # Full: the other side does not read.
            select.select([], [self._sink], [], _FULL_WAIT_S)
