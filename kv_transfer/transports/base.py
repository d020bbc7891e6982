"""What every transport of KV payloads offers: links of two halves, one that stages and posts, one that fetches.

Setting up a link takes one exchange of options in `LinkHello` and `LinkWelcome`, so that it needs no port or name that
is fixed, and is done off the data path:

    sender                                         receiver
    setup = transport.open_send()
      setup.options ───────── LinkHello ─────────> setup = transport.open_receive(options)
      setup.finish(options) <── LinkWelcome ────── setup.options;  setup.finish()

    staged = link.stage(n, deadline_s)      waits while the arena is full
    with link.filling(): ... staged.payload ...
    locator = link.post(staged) ── PageOffer ────> payload = link.fetch(locator, n, deadline_s)
                                                   with link.reading(): ... payload ...
    link.release(staged) <──────── PageAck ─────── link.done(payload)

Payload tensors lie where `Transport.memory` says: "cpu", or "cuda", on the device of the sender's and the receiver's
pool. There, what fills and reads them goes to a stream of the link's own, and has ended when the `with` is left.

Threads: `open_*`, `finish`, `stage` and `fetch` may block up to their deadline and are called on pool threads; `post`,
`release`, `done`, `cancel` and `close` return at once and may come from any thread. `close` makes waiting `stage` calls
raise; staged memory stays mapped until its last tensor is gone, but nothing new is placed there.

A transport may offer a `lane` besides: a socket between the two halves for short messages (`lane.py`), closed with the
link.

Failures raise `HandoverError`. A link whose data path failed is broken for good: it is closed and made anew.
"""

from __future__ import annotations

import threading
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.arena import DEFAULT_ARENA_BYTES, MAX_ARENA_BYTES, ArenaAllocator
from baton.kv_transfer.transports.lane import Lane

__all__ = [
    "DEFAULT_ARENA_BYTES",
    "MAX_ARENA_BYTES",
    "ReceiveLink",
    "ReceiveSetup",
    "SendLink",
    "SendSetup",
    "Staged",
    "Transport",
]

# Longer pieces start the receiver later and gain nothing any more.
_MAX_PIECE_BYTES = 4 << 20
# On a GPU 4 MiB take some microseconds, and what surrounds a piece some hundred.
_MAX_DEVICE_PIECE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True, eq=False)
class Staged:
    """A staging buffer that the caller owns until it releases it. `payload`: uint8, shape [num_bytes], contiguous."""

    offset: int
    payload: torch.Tensor


class SendLink(ABC):
    """The sending half of a link: a bounded arena of staging memory, and the way to post from it.

    Args:
        memory: uint8 tensor of the arena.
        peer: names the other side in errors.
        lane: to the receiving half, where the transport has one.
    """

    def __init__(self, memory: torch.Tensor, *, peer: str, lane: Lane | None = None) -> None:
        self.lane = lane
        self._memory: torch.Tensor | None = memory
        self._is_on_cpu = memory.is_cpu
        self._allocator = ArenaAllocator(memory.numel())
        self._room = threading.Condition()
        self._peer = peer

    @property
    def max_payload_bytes(self) -> int:
        """Longest payload worth staging: several fit into the arena, so that filling, sending and copying overlap."""
        longest = _MAX_PIECE_BYTES if self._is_on_cpu else _MAX_DEVICE_PIECE_BYTES
        return min(self._allocator.capacity_bytes // 4, longest)

    @property
    def staged_bytes(self) -> int:
        """Bytes of the arena that are handed out."""
        with self._room:
            return self._allocator.used_bytes

    def stage(self, num_bytes: int, deadline_s: float) -> Staged:
        """Take a staging buffer of `num_bytes` bytes, waiting up to `deadline_s` seconds for room.

        Raises:
            DeadlineError: no room in time: the peer does not fetch what is posted.
            HandoverError: the link is closed, or the payload exceeds the arena.
        """
        if num_bytes > self._allocator.capacity_bytes:
            raise HandoverError(
                f"a payload of {num_bytes} bytes exceeds the staging arena of {self._allocator.capacity_bytes} bytes"
            )
        end_s = time.monotonic() + deadline_s
        with self._room:
            while True:
                if self._memory is None:
                    raise HandoverError(f"link to {self._peer} is closed")
                offset = self._allocator.allocate(num_bytes)
                if offset is not None:
                    return Staged(offset, self._memory[offset : offset + num_bytes])
                left_s = end_s - time.monotonic()
                if left_s <= 0:
                    raise DeadlineError(
                        f"staging {num_bytes} bytes for {self._peer}: no room within {deadline_s:g} s, "
                        f"{self._allocator.used_bytes} bytes wait to be fetched"
                    )
                self._room.wait(left_s)

    @contextmanager
    def filling(self) -> Iterator[None]:
        """Around what writes into staged buffers (and sums them), on this thread."""
        yield

    @abstractmethod
    def post(self, staged: Staged) -> str:
        """Make a filled buffer fetchable and say where. Returns at once."""

    def release(self, staged: Staged) -> None:
        """Give a buffer back that nobody reads any more (acked, or never posted)."""
        with self._room:
            self._allocator.free(staged.offset)
            self._room.notify_all()

    def close(self) -> None:
        """Let go of the arena. Idempotent."""
        with self._room:
            self._memory = None
            self._room.notify_all()
        if self.lane is not None:
            self.lane.close()


class ReceiveLink(ABC):
    """The receiving half of a link. `lane`: to the sending half, where the transport has one."""

    lane: Lane | None = None

    @abstractmethod
    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        """Bring one posted payload here: uint8, shape [num_bytes], contiguous, valid until `done`.

        Raises:
            HandoverError: the locator is not one that this link can have given, or the link broke.
            DeadlineError: the peer did not deliver within `deadline_s` seconds; the link is broken then.
        """

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Around what reads fetched payloads, on this thread."""
        yield

    def done(self, payload: torch.Tensor) -> None:
        """The caller has finished with a fetched payload."""
        del payload

    @abstractmethod
    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        """Consume a posted payload that nobody wants, so that the sender may reuse its buffer. Raises like `fetch`."""

    @abstractmethod
    def close(self) -> None:
        """Let go of everything. Idempotent."""


class SendSetup(ABC):
    """A link in the making, sender's side. Either `finish` or `cancel` is called, once."""

    options: dict[str, str]

    @abstractmethod
    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        """Complete the link with the receiver's options. Raises HandoverError or DeadlineError; then all is undone."""

    @abstractmethod
    def cancel(self) -> None:
        """Undo everything: another transport was chosen or the peer refused."""


class ReceiveSetup(ABC):
    """A link in the making, receiver's side. Either `finish` or `cancel` is called, once."""

    options: dict[str, str]

    @abstractmethod
    def finish(self, deadline_s: float) -> ReceiveLink:
        """Complete the link. Raises HandoverError or DeadlineError; then all is undone."""

    @abstractmethod
    def cancel(self) -> None:
        """Undo everything."""


class Transport(ABC):
    """One way to carry payloads; makes any number of links. Option names start with `<name>.`.

    `memory`: where the payloads lie, "cpu" or "cuda".
    """

    name: str
    memory: str = "cpu"

    @abstractmethod
    def open_send(self, *, peer: str) -> SendSetup:
        """Begin a link to send on. Raises HandoverError where this host cannot."""

    @abstractmethod
    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """Begin a link to receive on, with the sender's options. Raises HandoverError where that cannot work."""

    def close(self) -> None:
        """Let go of what links share. Links are closed by their owners before."""
        return None
