"""Numbers on the messages of one direction of a stream: 1, 2, 3, ... What is missing is noticed, what repeats dropped.

    sender     message.seq = numbers.next()           just before the message goes out
    receiver   if numbers.accept(message.seq): ...    raises where one is missing

gRPC loses and repeats nothing on a stream that stands; faulty middle boxes, decorators and bugs do. A stream with a gap
is no stream any more: both ends drop it, and what ran on it goes on as after any other break.
"""

from __future__ import annotations

__all__ = ["SequenceGapError", "StreamOrder"]


class SequenceGapError(Exception):
    """A message is missing. The text says which."""


class StreamOrder:
    """One direction of one stream, at one of its ends."""

    __slots__ = ("_last",)

    def __init__(self) -> None:
        self._last = 0

    def next(self) -> int:
        """The number of the next message to send."""
        self._last += 1
        return self._last

    def accept(self, seq: int) -> bool:
        """Whether this message is new; False where it has come before.

        Messages without a number (0) are taken while none has come with one: their sender does not count.

        Raises:
            SequenceGapError: one is missing before it.
        """
        if seq == self._last + 1:
            self._last = seq
            return True
        if seq == 0 and self._last == 0:
            return True
        if 0 < seq <= self._last:
            return False
        raise SequenceGapError(f"message {seq} came after {self._last}")
