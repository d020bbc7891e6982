"""Payloads from GPU to GPU of one host, through memory that the sender shares with the receiver.

The sender owns one arena per link, which it fills and allocates from; its handle, 64 bytes, and the name of its GPU go
to the receiver with the hello. The receiver maps the arena. On another GPU it copies each payload out of it, device to
device, on a stream of the link's own; where both share one GPU the payload is handed out where it lies, since a copy
would only cost memory's time: the sender leaves it alone until it is acked. The sender has waited for its own stream
before it posts (`filling`), so a posted payload is complete, and needs no event that the two would share.

A locator is the offset of the payload in the arena; offsets are checked against the size that the sender has named. The
driver offers no way to check that size on this side, so a sender that lies about it can make the receiver's GPU fault:
like all who may open links, it is one of the cluster.

Both processes must see both GPUs (`CUDA_VISIBLE_DEVICES`), and these must reach each other's memory; else the set-up
says so, and the link goes over another transport.
"""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch

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
from baton.kv_transfer.transports.cuda_device import (
    HANDLE_BYTES,
    CudaDevice,
    ExportedMemory,
    ImportedMemory,
    has_ended,
)
from baton.kv_transfer.transports.spare_buffers import SpareBuffers

__all__ = ["CudaIpcTransport"]

_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_HANDLE = re.compile(rf"[0-9a-f]{{{2 * HANDLE_BYTES}}}")


class CudaIpcTransport(Transport):
    """Shared GPU memory on this host.

    Args:
        device: of this worker's pool.
        arena_bytes: staging memory of each link.
    """

    name = "cuda_ipc"
    memory = "cuda"

    def __init__(self, device: CudaDevice, *, arena_bytes: int = DEFAULT_ARENA_BYTES) -> None:
        self._device = device
        self._arena_bytes = arena_bytes

    def open_send(self, *, peer: str) -> SendSetup:
        """Allocate an arena and export it."""
        return _CudaIpcSendSetup(self._device, self._arena_bytes, peer)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """Map the sender's arena."""
        return _CudaIpcReceiveSetup(self._device, options, peer)


class _CudaIpcSendSetup(SendSetup):
    def __init__(self, device: CudaDevice, arena_bytes: int, peer: str) -> None:
        self._device = device
        self._peer = peer
        self._memory: ExportedMemory | None = device.export_memory(arena_bytes)
        self.options = {
            "cuda_ipc.handle": self._memory.handle.hex(),
            "cuda_ipc.bytes": str(arena_bytes),
            "cuda_ipc.gpu": device.uuid,
        }

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        del options, deadline_s
        assert self._memory is not None
        memory, self._memory = self._memory.tensor(), None
        return _CudaIpcSendLink(self._device, memory, peer=self._peer)

    def cancel(self) -> None:
        self._memory = None


class _CudaIpcSendLink(SendLink):
    def __init__(self, device: CudaDevice, memory: torch.Tensor, *, peer: str) -> None:
        super().__init__(memory, peer=peer)
        self._device = device
        self._stream = device.new_stream()

    @contextmanager
    def filling(self) -> Iterator[None]:
        with self._device.working_on(self._stream):
            yield

    def post(self, staged: Staged) -> str:
        return str(staged.offset)


class _CudaIpcReceiveSetup(ReceiveSetup):
    def __init__(self, device: CudaDevice, options: Mapping[str, str], peer: str) -> None:
        handle, size = options.get("cuda_ipc.handle", ""), options.get("cuda_ipc.bytes", "")
        gpu = options.get("cuda_ipc.gpu", "")
        if not _HANDLE.fullmatch(handle):
            raise HandoverError(f"{peer} names a memory handle {handle[:32]!r} that is not {HANDLE_BYTES} bytes in hex")
        if not _DECIMAL.fullmatch(size) or not 0 < int(size) <= MAX_ARENA_BYTES:
            raise HandoverError(f"{peer} offers an arena of {size[:32]!r} bytes; the limit is {MAX_ARENA_BYTES}")
        index = device.index_of(gpu)
        if index is None:
            raise HandoverError(
                f"GPU {gpu[:64]!r} of {peer} is not visible here: let workers of one host see all its GPUs "
                "(CUDA_VISIBLE_DEVICES)"
            )
        if not device.can_access(index):
            raise HandoverError(f"GPU {device.index} cannot reach the memory of GPU {index}, which {peer} uses")
        self._device = device
        self._is_same_gpu = index == device.index
        self._memory: ImportedMemory | None = device.import_memory(bytes.fromhex(handle))
        self._num_bytes = int(size)
        self._peer = peer
        self.options = {}

    def finish(self, deadline_s: float) -> ReceiveLink:
        del deadline_s
        assert self._memory is not None
        return _CudaIpcReceiveLink(self._device, self._memory, self._num_bytes, self._peer, self._is_same_gpu)

    def cancel(self) -> None:
        self._memory = None


class _CudaIpcReceiveLink(ReceiveLink):
    def __init__(
        self, device: CudaDevice, memory: ImportedMemory, num_bytes: int, peer: str, is_same_gpu: bool
    ) -> None:
        self._device = device
        self._is_same_gpu = is_same_gpu
        self._memory: ImportedMemory | None = memory
        self._num_bytes = num_bytes
        self._peer = peer
        self._stream = device.new_stream()
        self._spare = SpareBuffers(device.empty)
        self._broken = ""

    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        memory = self._memory
        if memory is None:
            raise HandoverError(f"link to {self._peer} is closed")
        if self._broken:
            raise HandoverError(f"link to {self._peer} is broken: {self._broken}")
        if not _DECIMAL.fullmatch(locator) or num_bytes <= 0 or int(locator) + num_bytes > self._num_bytes:
            raise HandoverError(
                f"{self._peer} offers {num_bytes} bytes at {locator[:32]!r}, outside of its arena of "
                f"{self._num_bytes} bytes"
            )
        if self._is_same_gpu:
            return memory.tensor(int(locator), num_bytes)
        end_s = time.monotonic() + deadline_s
        with self._device.on(self._stream):
            payload = self._spare.take(num_bytes)
            self._device.copy(payload, memory.pointer + int(locator), self._stream)
            copied = self._device.mark(self._stream)
        if not has_ended(copied, end_s):
            self._device.abandon(payload, memory)
            self._broken = self._broken or "a copy did not end"
            raise DeadlineError(f"copying {num_bytes} bytes from {self._peer} did not end within {deadline_s:g} s")
        return payload

    @contextmanager
    def reading(self) -> Iterator[None]:
        with self._device.working_on(self._stream):
            yield

    def done(self, payload: torch.Tensor) -> None:
        if not self._is_same_gpu:
            self._spare.give_back(payload)

    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        del locator, num_bytes, deadline_s

    def close(self) -> None:
        self._memory = None
        self._spare.close()
