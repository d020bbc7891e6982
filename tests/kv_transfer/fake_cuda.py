"""A GPU of plain memory and a communicator of Gloo: what `cuda_ipc` and `nccl` stand on, for machines without a GPU.

The fakes replace the narrow seam only: the functions of the CUDA runtime library, what torch says of GPUs and streams,
and the making of a process group. Memory is of memfd, so that another process can map it by its "handle".
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import secrets
import threading
from collections.abc import Iterator
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed

from baton.kv_transfer.transports.communicators import Communicators
from baton.kv_transfer.transports.cuda_device import HANDLE_BYTES, CudaDevice
from baton.kv_transfer.transports.cuda_ipc import CudaIpcTransport
from baton.kv_transfer.transports.nccl import NcclTransport

_dist: Any = torch.distributed

INVALID = 1


class FakeRuntime:
    """The functions of libcudart that are used, on ctypes' arguments as the real ones get them."""

    def __init__(self) -> None:
        self.current = ctypes.c_int(0)
        self.maps: dict[int, mmap.mmap] = {}
        self.files: dict[int, int] = {}
        self.failing: set[str] = set()
        self.cudaGetErrorString = _ErrorString()

    def cudaGetDevice(self, out: Any) -> int:
        out._obj.value = self.current.value
        return 0

    def cudaSetDevice(self, index: ctypes.c_int) -> int:
        self.current.value = index.value
        return 0

    def cudaGetLastError(self) -> int:
        return 0

    def cudaMalloc(self, out: Any, size: ctypes.c_size_t) -> int:
        if "cudaMalloc" in self.failing:
            return INVALID
        file = os.memfd_create("fake-gpu")
        os.ftruncate(file, size.value)
        out._obj.value = self._map(file)
        self.files[out._obj.value] = file
        return 0

    def cudaFree(self, pointer: ctypes.c_void_p) -> int:
        assert pointer.value is not None
        os.close(self.files.pop(pointer.value))
        del self.maps[pointer.value]
        return 0

    def cudaIpcGetMemHandle(self, out: Any, pointer: ctypes.c_void_p) -> int:
        if "cudaIpcGetMemHandle" in self.failing:
            return INVALID
        assert pointer.value is not None
        path = f"/proc/{os.getpid()}/fd/{self.files[pointer.value]}".encode()
        ctypes.memmove(ctypes.addressof(out._obj), path.ljust(HANDLE_BYTES, b"\0"), HANDLE_BYTES)
        return 0

    def cudaIpcOpenMemHandle(self, out: Any, handle: Any, flags: ctypes.c_uint) -> int:
        assert flags.value == 1
        try:
            file = os.open(bytes(handle.reserved).rstrip(b"\0"), os.O_RDWR)
        except OSError:
            return INVALID
        out._obj.value = self._map(file)
        os.close(file)
        return 0

    def cudaIpcCloseMemHandle(self, pointer: ctypes.c_void_p) -> int:
        assert pointer.value is not None
        del self.maps[pointer.value]
        return 0

    def cudaMemcpyAsync(self, target: Any, source: Any, size: Any, kind: ctypes.c_int, stream: Any) -> int:
        assert kind.value == 4
        ctypes.memmove(target.value, source.value, size.value)
        return 0

    def _map(self, file: int) -> int:
        mapped = mmap.mmap(file, os.fstat(file).st_size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(mapped))
        self.maps[address] = mapped
        return address


class _ErrorString:
    restype: object = None

    def __call__(self, code: ctypes.c_int) -> bytes:
        return b"invalid argument"


class FakeStream:
    cuda_stream = 0

    def __init__(self) -> None:
        self.calls: list[str] = []

    def wait_stream(self, other: object) -> None:
        self.calls.append("wait")

    def synchronize(self) -> None:
        self.calls.append("synchronize")


class FakeDevice(CudaDevice):
    """Each look at the name gives another, so that two ends in one process are two GPUs."""

    def __init__(self) -> None:
        super().__init__(0, FakeRuntime())
        self.visible: int | None = 0
        self.reachable = True
        self.streams: list[FakeStream] = []
        # How many events are asked in vain before one has happened.
        self.hangs = False

    @property
    def torch_device(self) -> torch.device:
        return torch.device("cpu")

    @property
    def uuid(self) -> str:
        return f"GPU-{secrets.token_hex(8)}"

    def index_of(self, uuid: str) -> int | None:
        return self.visible if uuid.startswith("GPU-") else None

    def can_access(self, index: int) -> bool:
        return self.reachable

    def new_stream(self) -> Any:
        self.streams.append(FakeStream())
        return self.streams[-1]

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        yield

    def _engine_stream(self) -> Any:
        return None

    def mark(self, stream: Any) -> Any:
        return SimpleNamespace(query=lambda: not self.hangs)

    def _tensor_at(self, pointer: int, num_bytes: int, owner: object) -> torch.Tensor:
        memory = (ctypes.c_uint8 * num_bytes).from_address(pointer)
        memory._owner = owner  # type: ignore[attr-defined]
        return torch.frombuffer(memory, dtype=torch.uint8)


class FakeGroup:
    """Two ranks over Gloo with one tag, hence in the order of posts; `abort` may be told to hang."""

    def __init__(self, group: Any, hang: threading.Event | None = None) -> None:
        self.group: Any = group
        self.error = "SUCCESS"
        self.num_aborts = 0
        self.hang = hang

    def send(self, tensors: list[torch.Tensor], rank: int, tag: int) -> FakeWork:
        return FakeWork(self, self.group.send(tensors, rank, tag))

    def recv(self, tensors: list[torch.Tensor], rank: int, tag: int) -> FakeWork:
        return FakeWork(self, self.group.recv(tensors, rank, tag))

    def get_error(self) -> Any:
        return SimpleNamespace(name=self.error)

    def abort(self) -> None:
        self.num_aborts += 1
        if self.hang is not None:
            self.hang.wait(60.0)
        self.group = None


class FakeWork:
    """Ends by itself, as on a GPU; Gloo's own works end only for those who wait for them."""

    def __init__(self, group: FakeGroup, work: Any) -> None:
        self._ended = threading.Event()

        def run() -> None:
            try:
                work.wait(timedelta(seconds=60))
            except RuntimeError:
                group.error = "COMM_ERROR"
            self._ended.set()

        threading.Thread(target=run, daemon=True).start()

    def is_completed(self) -> bool:
        return self._ended.is_set()


def make_fake_group(device: CudaDevice, store: Any, rank: int) -> FakeGroup:
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=15)
    options._threads = 1
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname="127.0.0.1")]
    return FakeGroup(_dist.ProcessGroupGloo(store, rank, 2, options))


class FakeCudaIpc(CudaIpcTransport):
    """The transport on a fake GPU."""

    name = "fake_cuda_ipc"

    def __init__(self, *, arena_bytes: int, device: FakeDevice | None = None) -> None:
        super().__init__(device or FakeDevice(), arena_bytes=arena_bytes)


class FakeCudaIpcFar(FakeCudaIpc):
    """The same between two GPUs of a host."""

    name = "fake_cuda_ipc_far"

    def __init__(self, *, arena_bytes: int) -> None:
        device = FakeDevice()
        device.visible = 1
        super().__init__(arena_bytes=arena_bytes, device=device)


class FakeNccl(NcclTransport):
    """The transport over fake communicators."""

    name = "fake_nccl"

    def __init__(self, *, arena_bytes: int, make_group: Any = make_fake_group, **options: Any) -> None:
        limits = Communicators(spacing_s=0.0, abort_timeout_s=0.05, **options)
        super().__init__(
            FakeDevice(),
            arena_bytes=arena_bytes,
            communicators=limits,
            make_group=make_group,
            version=lambda: "2.27.3",
        )
