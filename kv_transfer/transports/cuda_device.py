"""One GPU as the transports use it: streams, memory outside of PyTorch's pools, and memory of another process.

Memory that is shared with other processes comes from `cudaMalloc` itself: PyTorch's expandable segments cannot be
exported, and an exported block of its pool would show the peer whatever else lies in the same segment. It goes through
the CUDA runtime library that torch has loaded, so both speak of the same context.

Importing this file needs no GPU; making a `CudaDevice` does. `library` and the methods that torch serves are what tests
replace.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from baton.errors import HandoverError

__all__ = ["HANDLE_BYTES", "CudaDevice", "ExportedMemory", "ImportedMemory", "has_ended"]

HANDLE_BYTES = 64

# Exported memory is not given back to the driver before those who have mapped it have had the time to let go.
_GRACE_S = 60.0
# `cudaMalloc` packs smaller pieces into blocks of this size, and a handle exports the whole block.
_GRANULE_BYTES = 2 << 20
_LAZY_ENABLE_PEER_ACCESS = 1
_MEMCPY_DEFAULT = 4
_FIRST_PAUSE_S = 20e-6
_LONGEST_PAUSE_S = 1e-3


class _Handle(ctypes.Structure):
    """`cudaIpcMemHandle_t`, passed by value."""

    _fields_ = [("reserved", ctypes.c_ubyte * HANDLE_BYTES)]


class CudaDevice:
    """A GPU of this process. Thread-safe.

    Args:
        index: as torch counts.
        library: the CUDA runtime library; None for the one that torch has loaded.

    Raises:
        HandoverError: there is no such GPU or no such library.
    """

    def __init__(self, index: int, library: Any = None) -> None:
        self.index = index
        self._library = library if library is not None else _load_library()
        self._lock = threading.Lock()
        self._retired: list[tuple[float, int]] = []
        # What the GPU may still write to or read from though nobody waits for it any more: kept for ever.
        self._abandoned: list[object] = []

    @classmethod
    def of(cls, device: str) -> CudaDevice:
        """The GPU that torch calls so: "cuda:1", or "cuda" for the current one."""
        index = torch.device(device).index
        return cls(torch.cuda.current_device() if index is None else index)

    # ---------------------------------------------------------------- what torch serves

    @property
    def torch_device(self) -> torch.device:
        """For tensors of its own."""
        return torch.device("cuda", self.index)

    @property
    def uuid(self) -> str:
        """Equal in every process that sees this GPU."""
        return _uuid(self.index)

    def index_of(self, uuid: str) -> int | None:
        """The GPU of that name as this process counts; None where it is not visible."""
        return next((i for i in range(torch.cuda.device_count()) if _uuid(i) == uuid), None)

    def can_access(self, index: int) -> bool:
        """Whether kernels and copies of this GPU reach that one's memory."""
        return index == self.index or torch.cuda.can_device_access_peer(self.index, index)

    def new_stream(self) -> Any:
        """A stream of normal priority."""
        return torch.cuda.Stream(self.torch_device)

    @contextlib.contextmanager
    def on(self, stream: Any) -> Iterator[None]:
        """Run what this thread enqueues on `stream`."""
        with torch.cuda.stream(stream):
            yield

    @contextlib.contextmanager
    def working_on(self, stream: Any) -> Iterator[None]:
        """Like `on`, after all that the engine has enqueued so far, and left only when it has ended.

        The wait at the end is as unbounded as a copy on the CPU is: memory that the GPU may still touch must not be let
        go, and whoever watches the engine ends a process whose GPU stands still.
        """
        with self.on(stream):
            stream.wait_stream(self._engine_stream())
            try:
                yield
            finally:
                stream.synchronize()

    def _engine_stream(self) -> Any:
        return torch.cuda.default_stream(self.torch_device)

    def mark(self, stream: Any) -> Any:
        """An event behind all that is on `stream`; see `has_ended`."""
        return stream.record_event()

    def empty(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] of PyTorch's pool. Raises HandoverError when the GPU is full."""
        try:
            return torch.empty(num_bytes, dtype=torch.uint8, device=self.torch_device)
        except RuntimeError as error:
            raise HandoverError(f"no {num_bytes} bytes on {self.torch_device}: {str(error).splitlines()[0]}") from error

    def _tensor_at(self, pointer: int, num_bytes: int, owner: object) -> torch.Tensor:
        """A tensor over memory that `owner` keeps alive."""
        return torch.as_tensor(_ArrayInterface(pointer, num_bytes, owner), device=self.torch_device)

    # ---------------------------------------------------------------- memory for other processes

    def export_memory(self, num_bytes: int) -> ExportedMemory:
        """New memory that another process may map. Raises HandoverError."""
        self._free_retired(time.monotonic())
        pointer = ctypes.c_void_p()
        granules = -(-num_bytes // _GRANULE_BYTES)
        self._call("cudaMalloc", ctypes.byref(pointer), ctypes.c_size_t(granules * _GRANULE_BYTES))
        assert pointer.value is not None
        handle = _Handle()
        try:
            self._call("cudaIpcGetMemHandle", ctypes.byref(handle), pointer)
        except HandoverError:
            self._call("cudaFree", pointer)
            raise
        return ExportedMemory(self, pointer.value, num_bytes, bytes(handle.reserved))

    def import_memory(self, handle: bytes) -> ImportedMemory:
        """Map another process's memory. Raises HandoverError."""
        assert len(handle) == HANDLE_BYTES, f"a handle has {HANDLE_BYTES} bytes, not {len(handle)}"
        pointer = ctypes.c_void_p()
        flags = ctypes.c_uint(_LAZY_ENABLE_PEER_ACCESS)
        self._call("cudaIpcOpenMemHandle", ctypes.byref(pointer), _Handle.from_buffer_copy(handle), flags)
        assert pointer.value is not None
        return ImportedMemory(self, pointer.value)

    def copy(self, target: torch.Tensor, source: int, stream: Any) -> None:
        """Enqueue a copy of `target.numel()` bytes from address `source`. Raises HandoverError."""
        self._call(
            "cudaMemcpyAsync",
            ctypes.c_void_p(target.data_ptr()),
            ctypes.c_void_p(source),
            ctypes.c_size_t(target.numel()),
            ctypes.c_int(_MEMCPY_DEFAULT),
            ctypes.c_void_p(stream.cuda_stream),
        )

    def abandon(self, *things: object) -> None:
        """Keep `things` for the life of the process: work on them did not end in time, and may go on."""
        with self._lock:
            self._abandoned.extend(things)

    def retire(self, pointer: int) -> None:
        """Exported memory that nothing of this process uses any more."""
        with self._lock:
            self._retired.append((time.monotonic() + _GRACE_S, pointer))

    def unmap(self, pointer: int) -> None:
        """Imported memory that nothing of this process uses any more."""
        with contextlib.suppress(HandoverError):  # the exporter is gone, and its memory with it
            self._call("cudaIpcCloseMemHandle", ctypes.c_void_p(pointer))

    def _free_retired(self, now_s: float) -> None:
        with self._lock:
            due = [pointer for due_s, pointer in self._retired if now_s >= due_s]
            self._retired = [(due_s, pointer) for due_s, pointer in self._retired if now_s < due_s]
        for pointer in due:
            self._call("cudaFree", ctypes.c_void_p(pointer))

    def _call(self, name: str, *arguments: Any) -> None:
        """Call the runtime with this GPU current on the thread. Raises HandoverError."""
        with _current(self._library, self.index):
            code = getattr(self._library, name)(*arguments)
        if code != 0:
            # The error is kept for the next caller of the library, who has nothing to do with it.
            self._library.cudaGetLastError()
            raise HandoverError(f"{name} on GPU {self.index} failed: {_error_text(self._library, code)}")


class ExportedMemory:
    """Memory of this process with a handle for others. Goes back when its last tensor is gone, after a grace period."""

    def __init__(self, device: CudaDevice, pointer: int, num_bytes: int, handle: bytes) -> None:
        self.handle = handle
        self.num_bytes = num_bytes
        self._device = device
        self._pointer = pointer

    def tensor(self) -> torch.Tensor:
        """uint8 [num_bytes]; keeps the memory alive."""
        return self._device._tensor_at(self._pointer, self.num_bytes, self)

    def __del__(self) -> None:
        self._device.retire(self._pointer)


class ImportedMemory:
    """Memory of another process; unmapped when this object is gone."""

    def __init__(self, device: CudaDevice, pointer: int) -> None:
        self.pointer = pointer
        self._device = device

    def tensor(self, offset: int, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes] from `offset` on; keeps the memory mapped. On this GPU only, and inside of the memory."""
        return self._device._tensor_at(self.pointer + offset, num_bytes, self)

    def __del__(self) -> None:
        self._device.unmap(self.pointer)


class _ArrayInterface:
    """What torch makes a tensor of without a copy; lives as long as the tensor."""

    def __init__(self, pointer: int, num_bytes: int, owner: object) -> None:
        self._owner = owner
        self.__cuda_array_interface__ = {
            "shape": (num_bytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "strides": None,
            "version": 2,
        }


def has_ended(event: Any, end_s: float) -> bool:
    """Wait for an event, or anything with `query`, until `end_s` on the monotonic clock."""
    pause_s = _FIRST_PAUSE_S
    while not event.query():
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            return False
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
    return True


@contextlib.contextmanager
def _current(library: Any, index: int) -> Iterator[None]:
    """The runtime's current GPU is the thread's: put back what torch has set."""
    before = ctypes.c_int()
    library.cudaGetDevice(ctypes.byref(before))
    if before.value != index:
        library.cudaSetDevice(ctypes.c_int(index))
    try:
        yield
    finally:
        if before.value != index:
            library.cudaSetDevice(before)


def _load_library() -> Any:
    """The runtime that torch has loaded: another copy would have another idea of the current GPU."""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        raise HandoverError(f"no GPU here: {str(error).splitlines()[0]}") from error
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.rpartition(" ")[2]
        if Path(path).name.startswith("libcudart"):
            return ctypes.CDLL(path)
    raise HandoverError("torch has loaded no libcudart, which cuda_ipc needs")


def _error_text(library: Any, code: int) -> str:
    describe = library.cudaGetErrorString
    describe.restype = ctypes.c_char_p
    text = describe(ctypes.c_int(code))
    return f"{text.decode(errors='replace') if text else 'unknown error'} ({code})"


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
