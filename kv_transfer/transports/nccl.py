"""Payloads from GPU to GPU through a pairwise NCCL communicator of torch.distributed.

Each link is a process group of its own: rank 0 sends, rank 1 receives, no global group. They meet at a store that the
receiver hosts, under a prefix that is never used again. Its set-up ends with one small message, so a link that is up
has carried something, and nothing is connected in the middle of a handover.

Deadlines are the link's own. Torch's watchdog would end the whole process when a transfer hangs; it is told to leave
these groups alone, and a link that passes a deadline is broken and its communicator aborted (`communicators.py`).

Memory: `max_ctas` bounds the channels of a communicator, hence its buffers (about 6.5 MB each) and the share of the GPU
that transfers take from the engine. The environment bounds it further: NCCL_MAX_P2P_NCHANNELS, NCCL_BUFFSIZE.
"""

from __future__ import annotations

import re
import secrets
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

import torch.distributed

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import (
    DEFAULT_ARENA_BYTES,
    MAX_ARENA_BYTES,
    ReceiveLink,
    ReceiveSetup,
    SendLink,
    SendSetup,
    Transport,
)
from baton.kv_transfer.transports.communicators import Communicators
from baton.kv_transfer.transports.cuda_device import CudaDevice, has_ended
from baton.kv_transfer.transports.link_store import host_store
from baton.kv_transfer.transports.nccl_group import MakeGroup, WorkQuery, failure_of, make_nccl_group, nccl_version
from baton.kv_transfer.transports.nccl_links import Connection, NcclReceiveLink, NcclSendLink

__all__ = ["NcclTransport"]

# The type stubs of torch cover no stores.
_dist: Any = torch.distributed

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_PROBE_BYTES = 64
_PROBE_VALUE = 0x5A


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

    def connect(self, address: str, prefix: str, rank: int, *, peer: str, deadline_s: float) -> Connection:
        """Meet the peer, and carry one message."""
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
                if not has_ended(WorkQuery(work), end_s):
                    raise DeadlineError(f"the first message with {peer} did not end within {deadline_s:g} s")
                if failure := failure_of(group):
                    raise HandoverError(f"the first message with {peer} failed: {failure}")
                if not bool((probe == _PROBE_VALUE).all()):
                    raise HandoverError(f"the first message from {peer} came damaged")

        communicator = self.communicators.create(make, try_out, peer=peer, rank=rank, deadline_s=deadline_s)
        return Connection(device, self.communicators, communicator, stream, peer)


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
        connection = self._transport.connect(address, prefix, 0, peer=self._peer, deadline_s=deadline_s)
        try:
            return NcclSendLink(connection, connection.device.empty(self._arena_bytes))
        except HandoverError:
            connection.end()
            raise

    def cancel(self) -> None:
        return None


class _NcclReceiveSetup(ReceiveSetup):
    def __init__(self, transport: NcclTransport, address: str, arena_bytes: int, peer: str) -> None:
        self._transport = transport
        self._arena_bytes = arena_bytes
        self._peer = peer
        self._prefix = f"link/{secrets.token_hex(16)}"
        self._address = address
        self.options = {"nccl.store": address, "nccl.prefix": self._prefix}

    def finish(self, deadline_s: float) -> ReceiveLink:
        connection = self._transport.connect(self._address, self._prefix, 1, peer=self._peer, deadline_s=deadline_s)
        return NcclReceiveLink(connection, self._arena_bytes)

    def cancel(self) -> None:
        return None
