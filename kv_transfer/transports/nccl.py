"""Payloads from GPU to GPU through a pairwise NCCL communicator of torch.distributed.

Each link is a process group of its own: rank 0 sends, rank 1 receives, no global group. They meet at a store that the
receiver hosts, under a prefix that is never used again. Its set-up ends with one small message, so a link that is up
has carried something, and nothing is connected in the middle of a handover.

NCCL has no tags: what is received is what was sent next. A locator is therefore the number of the post, with the sizes
of the posts before it that the sender does not know to have arrived: `7:4096,512` is post 7, after 5 of 4096 bytes and
6 of 512. So a payload may be fetched in any order: those before it are received on the way and wait for their turn, and
at most `_MAX_LISTED` sizes are told (beyond, a fetch waits until those before it are asked for too). Payloads that
nobody wants are received and dropped.

Deadlines are the link's own. Torch's watchdog would end the whole process when a transfer hangs; it is told to leave
these groups alone, and a link that passes a deadline is broken and its communicator aborted (`communicators.py`).

Memory: `max_ctas` bounds the channels of a communicator, hence its buffers (about 6.5 MB each) and the share of the GPU
that transfers take from the engine. The environment bounds it further: NCCL_MAX_P2P_NCHANNELS, NCCL_BUFFSIZE.
"""

from __future__ import annotations

import os
import re
import secrets
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import (
    DEFAULT_ARENA_BYTES,
    MAX_ARENA_BYTES,
    ReceiveLink,
    ReceiveSetup,
    SendLink,
    SendSetup,
    Staged,
    Transport,
)
from baton.kv_transfer.transports.communicators import Communicator, Communicators
from baton.kv_transfer.transports.cuda_device import CudaDevice, has_ended
from baton.kv_transfer.transports.link_store import host_store
from baton.kv_transfer.transports.spare_buffers import SpareBuffers

__all__ = ["NcclTransport", "make_nccl_group"]

# The type stubs of torch know neither NCCL's options nor stores.
_dist: Any = torch.distributed

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_MAX_LISTED = 64
_LOCATOR = re.compile(
    rf"(0|[1-9][0-9]{{0,17}}):((?:[1-9][0-9]{{0,11}}(?:,[1-9][0-9]{{0,11}}){{0,{_MAX_LISTED - 1}}})?)"
)
_PROBE_BYTES = 64
_PROBE_VALUE = 0x5A
_MAX_CTAS = 4

# (device, store, rank) -> process group of two ranks on the device.
MakeGroup = Callable[[CudaDevice, Any, int], Any]

# Read by each group as it is made: no watchdog that ends the process, no warning about what is meant so.
_GROUP_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}
_environment_lock = threading.Lock()


def make_nccl_group(device: CudaDevice, store: Any, rank: int) -> Any:
    """A small communicator with one peer, on a stream of normal priority, connected at once."""
    options = _dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = False
    options._timeout = timedelta(days=1)
    # Calls return while NCCL works on them, which is what makes an abort possible.
    options.config.blocking = 0
    options.config.min_ctas = 1
    options.config.max_ctas = _MAX_CTAS
    with _environment_lock, _environment(_GROUP_ENVIRONMENT):
        group = _dist.ProcessGroupNCCL(store, rank, 2, options)
    # Without this the first transfer would make a second communicator for the same pair.
    group.eager_connect_single_device(device.torch_device)
    return group


def nccl_version() -> str:
    """Of the library that runs."""
    return ".".join(map(str, _dist.ProcessGroupNCCL.get_runtime_nccl_version()))


class NcclTransport(Transport):
    """NCCL between GPUs of one host or several.

    Args:
        device: of this worker's pool.
        host: address of this host that peers reach, for the store.
        arena_bytes: staging memory of each link on the sender.
        setup_timeout_s: how long the store waits for a peer.
        communicators: limits; None for the usual ones.
        make_group, version: for tests.
    """

    name = "nccl"
    memory = "cuda"

    def __init__(
        self,
        device: CudaDevice,
        *,
        host: str = "127.0.0.1",
        arena_bytes: int = DEFAULT_ARENA_BYTES,
        setup_timeout_s: float = 10.0,
        communicators: Communicators | None = None,
        make_group: MakeGroup = make_nccl_group,
        version: Callable[[], str] = nccl_version,
    ) -> None:
        self._device = device
        self._host = host
        self._arena_bytes = arena_bytes
        self._setup_timeout_s = setup_timeout_s
        self.communicators = communicators or Communicators()
        self._make_group = make_group
        self._version = version
        self._store: Any = None
        self._store_lock = threading.Lock()

    def open_send(self, *, peer: str) -> SendSetup:
        """Nothing is made before the receiver says where to meet."""
        self.communicators.check_room(peer)
        options = {
            "nccl.gpu": self._device.uuid,
            "nccl.version": self._version(),
            "nccl.bytes": str(self._arena_bytes),
        }
        return _NcclSendSetup(self, options, self._arena_bytes, peer)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """Host the store, once for all links, and draw the link's prefix."""
        gpu, version, size = (options.get(f"nccl.{name}", "") for name in ("gpu", "version", "bytes"))
        if not gpu or gpu == self._device.uuid:
            raise HandoverError(f"{peer} is on the same GPU {gpu[:64]!r}: NCCL needs two")
        if version != self._version():
            raise HandoverError(f"{peer} has NCCL {version[:32]!r}, here it is {self._version()}")
        if not _DECIMAL.fullmatch(size) or not 0 < int(size) <= MAX_ARENA_BYTES:
            raise HandoverError(f"{peer} offers an arena of {size[:32]!r} bytes; the limit is {MAX_ARENA_BYTES}")
        self.communicators.check_room(peer)
        with self._store_lock:
            if self._store is None:
                self._store = host_store(self._host, self._setup_timeout_s)
            return _NcclReceiveSetup(self, f"{self._host}:{self._store.port}", int(size), peer)

    def close(self) -> None:
        """Stop the store."""
        with self._store_lock:
            self._store = None

    def connect(
        self, address: str, prefix: str, rank: int, *, peer: str, deadline_s: float
    ) -> tuple[Communicator, Any]:
        """Meet the peer, and carry one message. The communicator, and the link's stream."""
        host, _, port = address.rpartition(":")
        device = self._device
        stream = device.new_stream()

        end_s = time.monotonic() + deadline_s
        timeout = timedelta(seconds=deadline_s)

        def make() -> Any:
            client = _dist.TCPStore(host, int(port), None, False, timeout, wait_for_workers=False)
            with device.on(stream):
                return self._make_group(device, _dist.PrefixStore(prefix, client), rank)

        def try_out(group: Any) -> None:
            with device.on(stream):
                probe = device.empty(_PROBE_BYTES).fill_(0 if rank else _PROBE_VALUE)
                work = group.send([probe], 1, 0) if rank == 0 else group.recv([probe], 0, 0)
                if not has_ended(_Query(work), end_s):
                    raise DeadlineError(f"the first message with {peer} did not end within {deadline_s:g} s")
                if failure := _failure(group):
                    raise HandoverError(f"the first message with {peer} failed: {failure}")
                if not bool((probe == _PROBE_VALUE).all()):
                    raise HandoverError(f"the first message from {peer} came damaged")

        return self.communicators.create(make, try_out, peer=peer, rank=rank, deadline_s=deadline_s), stream


class _NcclSendSetup(SendSetup):
    def __init__(self, transport: NcclTransport, options: dict[str, str], arena_bytes: int, peer: str) -> None:
        self._transport = transport
        self._arena_bytes = arena_bytes
        self._peer = peer
        self.options = options

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        address, prefix = options.get("nccl.store", ""), options.get("nccl.prefix", "")
        host, _, port = address.rpartition(":")
        if not host or not _DECIMAL.fullmatch(port) or not prefix:
            raise HandoverError(f"{self._peer} names no usable store: {address[:64]!r}")
        transport = self._transport
        memory = transport._device.empty(self._arena_bytes)
        communicator, stream = transport.connect(address, prefix, 0, peer=self._peer, deadline_s=deadline_s)
        return _NcclSendLink(transport, communicator, stream, memory, peer=self._peer)

    def cancel(self) -> None:
        return None


@dataclass(slots=True)
class _Post:
    seq: int
    num_bytes: int
    work: Any


class _NcclSendLink(SendLink):
    def __init__(
        self, transport: NcclTransport, communicator: Communicator, stream: Any, memory: torch.Tensor, *, peer: str
    ) -> None:
        super().__init__(memory, peer=peer)
        self._device = transport._device
        self._communicators = transport.communicators
        self._communicator = communicator
        self._stream = stream
        self._next_seq = 0
        # Sizes of the posts that are not known to have arrived, oldest first; its last is that of `_next_seq - 1`.
        self._sizes: list[int] = []
        self._posts: dict[int, _Post] = {}

    @contextmanager
    def filling(self) -> Iterator[None]:
        with self._device.working_on(self._stream):
            yield

    def post(self, staged: Staged) -> str:
        num_bytes = staged.payload.numel()
        with self._room:
            if self._memory is None:
                raise HandoverError(f"link to {self._peer} is closed")
            seq = self._next_seq
            try:
                # On the link's stream: a send waits for what is on the caller's, and that would be the engine.
                with self._device.on(self._stream):
                    work = self._communicator.group.send([staged.payload], 1, 0)
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
                self._communicators.end(self._communicator, memory, *self._posts.values())
                self._posts.clear()


class _NcclReceiveSetup(ReceiveSetup):
    def __init__(self, transport: NcclTransport, address: str, arena_bytes: int, peer: str) -> None:
        self._transport = transport
        self._arena_bytes = arena_bytes
        self._peer = peer
        self._prefix = f"link/{secrets.token_hex(16)}"
        self._address = address
        self.options = {"nccl.store": address, "nccl.prefix": self._prefix}

    def finish(self, deadline_s: float) -> ReceiveLink:
        transport = self._transport
        communicator, stream = transport.connect(self._address, self._prefix, 1, peer=self._peer, deadline_s=deadline_s)
        return _NcclReceiveLink(transport, communicator, stream, self._arena_bytes, self._peer)

    def cancel(self) -> None:
        return None


@dataclass(slots=True)
class _Arrival:
    """A payload on its way: `work` ends when `buffer` holds it."""

    work: Any
    buffer: torch.Tensor


class _NcclReceiveLink(ReceiveLink):
    def __init__(
        self, transport: NcclTransport, communicator: Communicator, stream: Any, arena_bytes: int, peer: str
    ) -> None:
        self._device = transport._device
        self._communicators = transport.communicators
        self._communicator = communicator
        self._stream = stream
        self._arena_bytes = arena_bytes
        self._peer = peer
        self._spare = SpareBuffers(self._device.empty)
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
        if not has_ended(_Query(arrival.work), end_s):
            with self._changed:
                raise self._late(num_bytes, deadline_s)
        if failure := _failure(self._communicator.group):
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
                with self._device.on(self._stream):
                    buffer = self._spare.take(size)
                    work = self._communicator.group.recv([buffer], 0, 0)
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
        self._communicators.end(self._communicator, *self._arrivals.values())
        self._spare.close()
        self._changed.notify_all()

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._device.working_on(self._stream):
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


class _Query:
    """A work as `has_ended` asks it."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def query(self) -> bool:
        return bool(self._work.is_completed())


def _failure(group: Any) -> str:
    """What went wrong with a group, as far as it knows; "" for nothing.

    A failed work counts as completed. Asking the work itself would throw, but also abort the communicator on this very
    thread, which may hang; what a failure has left in a payload is found by its checksum.
    """
    if group is None:
        return "the communicator is aborted"
    error = group.get_error().name
    return "" if error == "SUCCESS" else f"NCCL reports {error}"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
