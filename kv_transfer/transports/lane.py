"""A socket beside a shared memory segment: small messages between two processes of one host, without a network stack.

    sender                                         receiver
    listener = LaneListener(folder, name)
                   ──── name, in LinkHello ────>   lane = connect_lane(folder, name)
    lane = listener.accept() <── LinkWelcome ───

A Unix socket that keeps messages apart (SOCK_SEQPACKET): the kernel hands each one over whole or not at all, in order,
and tells when the other process is gone, so there is no torn, lost or stale message to guard against. Its name lies in
the segment's folder and goes as soon as both sides have met; both check that the other process is of the same user.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from baton.errors import HandoverError

__all__ = ["Lane", "LaneListener", "connect_lane"]

_MAX_MESSAGE_BYTES = 32 << 10

_CREDENTIALS = struct.Struct("3i")


class Lane:
    """One side of a lane."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._lock = threading.Lock()
        self._num_receiving = 0
        self._is_open = True

    def fileno(self) -> int:
        """For selectors; -1 once it is closed."""
        return self._socket.fileno()

    def send(self, message: bytes) -> bool:
        """Hand a message over, not empty. Never blocks; for any thread.

        False says that it must go another way: it is too long, the other side does not read, or the lane has ended.
        """
        if not self._is_open or len(message) > _MAX_MESSAGE_BYTES:
            return False
        try:
            return self._socket.send(message, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL) == len(message)
        except OSError:
            return False

    def receive(self, *, wait: bool) -> bytes | None:
        """The next message; b"" when there will be none any more, None when there is none yet and `wait` is false."""
        with self._lock:
            if not self._is_open:
                return b""
            self._num_receiving += 1
        try:
            return self._socket.recv(_MAX_MESSAGE_BYTES, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            return b""
        finally:
            with self._lock:
                self._num_receiving -= 1
                if not self._is_open:
                    self._socket.close()

    def close(self) -> None:
        """End the lane for both sides; who waits in `receive` is told. Idempotent, for any thread."""
        with self._lock:
            self._is_open = False
            with contextlib.suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)
            # A descriptor that somebody waits on must not become another one's.
            if self._num_receiving == 0:
                self._socket.close()


class LaneListener:
    """Where the receiver of a link may connect, once. Ended by `close`, also after `accept`.

    Raises:
        HandoverError: this host has no such sockets, or the folder takes none.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._path = folder / name
        self._socket = _make_socket()
        try:
            # Takes effect on the file that `bind` makes.
            os.fchmod(self._socket.fileno(), 0o600)
            with _short(folder) as short:
                self._socket.bind(f"{short}/{name}")
            self._socket.listen(1)
        except OSError as error:
            self._socket.close()
            raise HandoverError(f"no socket {self._path} can be made: {error.strerror}") from error

    def accept(self, deadline_s: float) -> Lane:
        """The lane to a receiver that has connected.

        Raises:
            HandoverError: nobody has, or it is a process of somebody else.
        """
        self._socket.settimeout(deadline_s)
        try:
            connected, _ = self._socket.accept()
        except OSError as error:
            raise HandoverError(f"nobody came to {self._path} within {deadline_s:g} s: {error}") from error
        return _checked(connected, self._path)

    def close(self) -> None:
        """Take the name away. Idempotent."""
        self._socket.close()
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()


def connect_lane(folder: Path, name: str) -> Lane:
    """The lane to the sender that listens at this name.

    Raises:
        HandoverError: nobody listens there, or a process of somebody else.
    """
    made = _make_socket()
    try:
        # Nobody has to wait for a listener that has room: one that is full is not ours.
        made.setblocking(False)
        with _short(folder) as short:
            made.connect(f"{short}/{name}")
    except OSError as error:
        made.close()
        raise HandoverError(f"no socket {folder / name} can be reached: {error.strerror}") from error
    return _checked(made, folder / name)


@contextlib.contextmanager
def _short(folder: Path) -> Iterator[str]:
    """A short name of the folder: addresses of sockets have room for 107 bytes."""
    descriptor = os.open(folder, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{descriptor}"
    finally:
        os.close(descriptor)


def _make_socket() -> socket.socket:
    try:
        return socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    except OSError as error:
        raise HandoverError(f"this host has no message sockets: {error.strerror}") from error


def _checked(connected: socket.socket, path: Path) -> Lane:
    connected.setblocking(True)
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    _, user_id, _ = _CREDENTIALS.unpack(credentials)
    if user_id != os.getuid():
        connected.close()
        raise HandoverError(f"the other side of {path} is a process of user {user_id}, not of {os.getuid()}")
    return Lane(connected)
