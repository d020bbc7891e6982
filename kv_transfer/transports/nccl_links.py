"""The two halves of an NCCL link that is up: posts on one side, receives in the order of the posts on the other.

NCCL has no tags: what is received is what was sent next. A locator is therefore the number of the post, with the sizes
of the posts before it that the sender does not know to have arrived: `7:4096,512` is post 7, after 5 of 4096 bytes and
6 of 512. So a payload may be fetched in any order: those before it are received on the way and wait for their turn, and
at most `_MAX_LISTED` sizes are told (beyond, a fetch waits until those before it are asked for too). Payloads that
nobody wants are received and dropped.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import ReceiveLink, SendLink, Staged
from baton.kv_transfer.transports.communicators import Communicator, Communicators
from baton.kv_transfer.transports.cuda_device import CudaDevice, has_ended
from baton.kv_transfer.transports.nccl_group import WorkQuery, failure_of
from baton.kv_transfer.transports.spare_buffers import SpareBuffers

__all__ = ["Connection", "NcclReceiveLink", "NcclSendLink"]

_MAX_LISTED = 64
_LOCATOR = re.compile(
    rf"(0|[1-9][0-9]{{0,17}}):((?:[1-9][0-9]{{0,11}}(?:,[1-9][0-9]{{0,11}}){{0,{_MAX_LISTED - 1}}})?)"
)


@dataclass(frozen=True, slots=True)
class Connection:
    """What either half is made of. Transfers wait for what is on `stream`, the link's own, and not for the engine."""

    device: CudaDevice
    communicators: Communicators
    communicator: Communicator
    stream: Any
    peer: str

    def on_stream(self) -> AbstractContextManager[None]:
        """Around transfers."""
        return self.device.on(self.stream)

    def working(self) -> AbstractContextManager[None]:
        """Around what fills and reads payloads."""
        return self.device.working_on(self.stream)

    def end(self, *keep: object) -> None:
        """Abort, and keep what transfers may touch until that is done."""
        self.communicators.end(self.communicator, *keep)


@dataclass(slots=True)
class _Post:
    seq: int
    num_bytes: int
    work: Any


class NcclSendLink(SendLink):
    def __init__(self, connection: Connection, memory: torch.Tensor) -> None:
        super().__init__(memory, peer=connection.peer)
        self._connection = connection
        self._next_seq = 0
        # Sizes of the posts that are not known to have arrived, oldest first; its last is that of `_next_seq - 1`.
        self._sizes: list[int] = []
        self._posts: dict[int, _Post] = {}

    @contextmanager
    def filling(self) -> Iterator[None]:
        with self._connection.working():
            yield

    def post(self, staged: Staged) -> str:
        num_bytes = staged.payload.numel()
        with self._room:
            if self._memory is None:
                raise HandoverError(f"link to {self._peer} is closed")
            seq = self._next_seq
            try:
                # On the link's stream: a send waits for what is on the caller's, and that would be the engine.
                with self._connection.on_stream():
                    work = self._connection.communicator.group.send([staged.payload], 1, 0)
            except RuntimeError as error:
                raise HandoverError(f"sending to {self._peer} failed: {_first_line(error)}") from error
            locator = f"{seq}:{','.join(map(str, self._sizes[-_MAX_LISTED:]))}"
            self._posts[staged.offset] = _Post(seq, num_bytes, work)
            self._sizes.append(num_bytes)
            self._next_seq += 1
        return locator

    def release(self, staged: Staged) -> None:
        with self._room:
            post = self._posts.pop(staged.offset, None)
            if post is not None:
                # It has arrived, and with it all that was sent before.
                first = self._next_seq - len(self._sizes)
                del self._sizes[: max(0, post.seq + 1 - first)]
        super().release(staged)

    def close(self) -> None:
        with self._room:
            memory = self._memory
            super().close()
            if memory is not None:
                self._connection.end(memory, *self._posts.values())
                self._posts.clear()


@dataclass(slots=True)
class _Arrival:
    """A payload on its way: `work` ends when `buffer` holds it."""

    work: Any
    buffer: torch.Tensor


class NcclReceiveLink(ReceiveLink):
    def __init__(self, connection: Connection, arena_bytes: int) -> None:
        self._connection = connection
        self._peer = connection.peer
        self._arena_bytes = arena_bytes
        self._spare = SpareBuffers(connection.device.empty)
        self._changed = threading.Condition()
        self._is_closed = False
        self._broken = ""
        self._next_seq = 0
        # By number; those that were asked for and are waited for stay until they have ended.
        self._arrivals: dict[int, _Arrival] = {}
        self._claimed: set[int] = set()

    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        end_s = time.monotonic() + deadline_s
        match = _LOCATOR.fullmatch(locator)
        sizes = [int(size) for size in match[2].split(",") if size] if match else []
        if match is None or not 0 < num_bytes <= self._arena_bytes or sum(sizes) > self._arena_bytes:
            raise HandoverError(f"{self._peer} offers {num_bytes} bytes at {locator[:32]!r}, which is no post")
        seq = int(match[1])
        with self._changed:
            self._check_open()
            while self._next_seq < seq - len(sizes):
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise self._late(num_bytes, deadline_s)
                self._changed.wait(left_s)
                self._check_open()
            self._receive_up_to(seq, [*sizes, num_bytes])
            arrival = self._arrivals.get(seq)
            if arrival is None or seq in self._claimed or arrival.buffer.numel() != num_bytes:
                raise HandoverError(f"{self._peer} offers {num_bytes} bytes at {locator[:32]!r}, which is no such post")
            self._claimed.add(seq)
        if not has_ended(WorkQuery(arrival.work), end_s):
            with self._changed:
                raise self._late(num_bytes, deadline_s)
        if failure := failure_of(self._connection.communicator.group):
            with self._changed:
                self._break(failure)
            raise HandoverError(f"receiving from {self._peer} failed: {failure}")
        with self._changed:
            self._check_open()
            del self._arrivals[seq]
            self._claimed.discard(seq)
        return arrival.buffer

    def _receive_up_to(self, last_seq: int, sizes: list[int]) -> None:
        """Post the receives that are not posted yet, up to `last_seq`, whose size is the last of `sizes`."""
        while self._next_seq <= last_seq:
            size = sizes[self._next_seq - last_seq - 1]
            waiting = sum(arrival.buffer.numel() for arrival in self._arrivals.values())
            if waiting + size > self._arena_bytes:
                raise HandoverError(
                    f"{self._peer} has {waiting + size} bytes under way; its arena has {self._arena_bytes}"
                )
            try:
                with self._connection.on_stream():
                    buffer = self._spare.take(size)
                    work = self._connection.communicator.group.recv([buffer], 0, 0)
            except RuntimeError as error:
                self._break(_first_line(error))
                raise HandoverError(f"receiving from {self._peer} failed: {_first_line(error)}") from error
            self._arrivals[self._next_seq] = _Arrival(work, buffer)
            self._next_seq += 1
            self._changed.notify_all()

    def _check_open(self) -> None:
        if self._broken:
            raise HandoverError(f"link to {self._peer} is broken: {self._broken}")
        if self._is_closed:
            raise HandoverError(f"link to {self._peer} is closed")

    def _late(self, num_bytes: int, deadline_s: float) -> HandoverError | DeadlineError:
        text = f"{self._peer} did not deliver {num_bytes} bytes within {deadline_s:g} s"
        self._break(text)
        return DeadlineError(text)

    def _break(self, reason: str) -> None:
        """What is not received now never is: nothing that follows would be what it is taken for."""
        if not self._broken and not self._is_closed:
            self._broken = reason
            self._end()

    def _end(self) -> None:
        self._connection.end(*self._arrivals.values())
        self._spare.close()
        self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._connection.working():
            yield

    def done(self, payload: torch.Tensor) -> None:
        self._spare.give_back(payload)

    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        self.done(self.fetch(locator, num_bytes, deadline_s))

    def close(self) -> None:
        with self._changed:
            if not self._is_closed:
                self._is_closed = True
                self._end()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
