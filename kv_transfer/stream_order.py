"""Numbers on the messages of a stream: what was lost on the way, or came twice, is noticed. Pure.

    sending side     next() -> 1, 2, 3 ...   one per message, in the order in which they are written
    receiving side   take(1) True, take(2) True, take(2) False (drop it), take(5) -> HandoverError (end the link)

The layers below deliver every message once and in order, until something between the two sides does not: a proxy, a
bug, a fault on purpose. A link that went on behind a lost completion would wait for its lease. Lanes need no numbers,
see `transports/lane.py`.
"""

from __future__ import annotations

from baton.errors import HandoverError

__all__ = ["ReceivedOrder", "SentOrder"]


class SentOrder:
    """The numbers of what one side of a stream writes."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """The number of the next message, from 1."""
        self._last += 1
        return self._last


class ReceivedOrder:
    """The numbers of what one side of a stream reads.

    Args:
        peer: who writes, for the error's text.
    """

    __slots__ = ("_last", "_peer")

    def __init__(self, peer: str) -> None:
        self._last = 0
        self._peer = peer

    def take(self, seq: int) -> bool:
        """Whether the message is new; what came before is to be dropped.

        Raises:
            HandoverError: at least one message is missing; names the number that came and the one that was due.
        """
        if seq == self._last + 1:
            self._last = seq
            return True
        if 0 < seq <= self._last:
            return False
        raise HandoverError(f"a message of {self._peer} is missing: number {seq} came, {self._last + 1} was due")
