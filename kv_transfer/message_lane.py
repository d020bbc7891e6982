"""Short messages of a link on their fast way, where its transport has one: a socket on the event loop's own selector.

A message takes one system call on each side. gRPC, which takes some hundred microseconds and as much processor time,
carries what the lane does not take: long messages, those for which its buffer has no room, and everything when it has
ended. So messages may overtake each other; each says by its epoch and numbers what it is about, and the state machines
take them in any order.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

from baton.kv_transfer.transports.lane import MAX_MESSAGE_BYTES

__all__ = ["MessageLane"]

# Then others on the loop have their turn.
_MAX_BURST = 32


class MessageLane:
    """One side of a lane. Made on the event loop's thread; everything but `send` runs there.

    Args:
        connected: the transport's socket; whoever made it closes it, after this lane.
        on_message: told each message.
        on_end: told once when the other side has closed, or the socket broke; not after `close`.
    """

    def __init__(
        self, connected: socket.socket, on_message: Callable[[bytes], None], on_end: Callable[[], None]
    ) -> None:
        self._socket = connected
        self._on_message = on_message
        self._on_end = on_end
        self._is_open = True
        self._is_reading = False
        self._loop = asyncio.get_running_loop()
        self.resume()

    def send(self, message: bytes) -> bool:
        """Hand a message over; False when it must go another way. Never blocks; for any thread."""
        if not self._is_open or len(message) > MAX_MESSAGE_BYTES:
            return False
        try:
            return self._socket.send(message) == len(message)
        except OSError:
            return False

    def pause(self) -> None:
        """Read no more for now: messages wait in the socket, and then with their sender."""
        if self._is_reading:
            self._is_reading = False
            self._loop.remove_reader(self._socket)

    def resume(self) -> None:
        """Read on."""
        if self._is_open and not self._is_reading:
            self._is_reading = True
            self._loop.add_reader(self._socket, self._read)

    def close(self) -> None:
        """Neither read nor send any more. Idempotent."""
        self.pause()
        self._is_open = False

    def _read(self) -> None:
        for _ in range(_MAX_BURST):
            if not self._is_reading:
                return
            try:
                message = self._socket.recv(MAX_MESSAGE_BYTES)
            except BlockingIOError:
                return
            except OSError:
                message = b""
            if not message:
                self.close()
                self._on_end()
                return
            self._on_message(message)
