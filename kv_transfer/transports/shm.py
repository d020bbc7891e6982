"""Payloads through POSIX shared memory, for peers on one host.

The sender owns one arena per link: a file in `/dev/shm` of a random name, which it maps, fills and allocates from. The
receiver opens it by name during set-up, maps it read-only, and both unlink the name at once: from then on the memory
lives as long as one of the two mappings, so nothing is left behind however a process ends. All pages of the arena are
allocated and mapped at set-up, so a full `/dev/shm` is an error there and never a fault in the middle of a copy, and
copies cost no page faults.

Beside the segment lies a socket for the link's messages (`lane.py`), met and unlinked in the same way. A link without
one works, only slower.

A locator is the offset of the payload in the arena. The receiver trusts none of what it is told: the name must match
our pattern, the file must be a regular file of our user and of the size said, and offsets must lie inside of it.
"""

from __future__ import annotations

import contextlib
import logging
import mmap
import os
import re
import secrets
import stat
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch

from baton.errors import HandoverError
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
from baton.kv_transfer.transports.lane import Lane, LaneListener, connect_lane

__all__ = ["SEGMENT_PREFIX", "ShmTransport"]

_log = logging.getLogger(__name__)

SEGMENT_PREFIX = "baton-kv-"
_NAME = re.compile(rf"{SEGMENT_PREFIX}[0-9a-f]{{32}}")
_DECIMAL = re.compile(r"0|[1-9][0-9]{0,18}")
_FOLDER = Path("/dev/shm")
_LANE_SUFFIX = "-lane"


class ShmTransport(Transport):
    """Shared memory on this host.

    Args:
        arena_bytes: staging memory of each link.
        folder: a memory file system that both peers see.
    """

    name = "shm"

    def __init__(self, *, arena_bytes: int = DEFAULT_ARENA_BYTES, folder: Path = _FOLDER) -> None:
        self._arena_bytes = arena_bytes
        self._folder = folder

    def open_send(self, *, peer: str) -> SendSetup:
        """Create and map an arena."""
        return _ShmSendSetup(self._folder, self._arena_bytes, peer)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        """Map the sender's arena."""
        return _ShmReceiveSetup(self._folder, options, peer)


class _ShmSendSetup(SendSetup):
    def __init__(self, folder: Path, arena_bytes: int, peer: str) -> None:
        name = SEGMENT_PREFIX + secrets.token_hex(16)
        self._path = folder / name
        self._peer = peer
        try:
            descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
            try:
                os.posix_fallocate(descriptor, 0, arena_bytes)
                self._map = mmap.mmap(descriptor, arena_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
            except BaseException:
                self._path.unlink()
                raise
            finally:
                os.close(descriptor)
        except OSError as error:
            raise HandoverError(
                f"no shared memory of {arena_bytes} bytes in {folder} for {peer}: {error.strerror}; "
                "enlarge it or use transport gloo"
            ) from error
        self.options = {"shm.name": name, "shm.bytes": str(arena_bytes)}
        self._listener: LaneListener | None = None
        try:
            self._listener = LaneListener(folder, name + _LANE_SUFFIX)
            self.options["shm.lane"] = "yes"
        except HandoverError as error:
            _log.warning("messages to %s take the network: %s", peer, error)

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        lane = None
        try:
            if self._listener is not None and options.get("shm.lane") == "yes":
                lane = self._listener.accept(deadline_s)
        finally:
            self.cancel()
        return _ShmSendLink(torch.frombuffer(self._map, dtype=torch.uint8), peer=self._peer, lane=lane)

    def cancel(self) -> None:
        if self._listener is not None:
            self._listener.close()
        _unlink(self._path)


class _ShmSendLink(SendLink):
    def post(self, staged: Staged) -> str:
        return str(staged.offset)


class _ShmReceiveSetup(ReceiveSetup):
    def __init__(self, folder: Path, options: Mapping[str, str], peer: str) -> None:
        name, size = options.get("shm.name", ""), options.get("shm.bytes", "")
        if not _NAME.fullmatch(name):
            raise HandoverError(f"{peer} names a shared memory segment {name[:64]!r} that is not one of ours")
        if not _DECIMAL.fullmatch(size) or not 0 < int(size) <= MAX_ARENA_BYTES:
            raise HandoverError(f"{peer} offers a segment of {size[:32]!r} bytes; the limit is {MAX_ARENA_BYTES}")
        try:
            descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise HandoverError(f"segment {name} of {peer} cannot be opened here: {error.strerror}") from error
        try:
            status = os.fstat(descriptor)
            if not stat.S_ISREG(status.st_mode) or status.st_uid != os.getuid() or status.st_size != int(size):
                raise HandoverError(f"segment {name} of {peer} is not a file of ours of {size} bytes")
            mapped = mmap.mmap(descriptor, int(size), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE, prot=mmap.PROT_READ)
        except OSError as error:
            raise HandoverError(f"segment {name} of {peer} cannot be mapped: {error.strerror}") from error
        finally:
            os.close(descriptor)
        _unlink(folder / name)
        with warnings.catch_warnings():
            # The mapping is read-only on purpose, and nothing here writes into the tensor.
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            self._memory = torch.frombuffer(mapped, dtype=torch.uint8)
        self._peer = peer
        self._lane: Lane | None = None
        self.options = {}
        if options.get("shm.lane") == "yes":
            try:
                self._lane = connect_lane(folder, name + _LANE_SUFFIX)
                self.options["shm.lane"] = "yes"
            except HandoverError as error:
                _log.warning("messages to %s take the network: %s", peer, error)
            _unlink(folder / (name + _LANE_SUFFIX))

    def finish(self, deadline_s: float) -> ReceiveLink:
        del deadline_s
        return _ShmReceiveLink(self._memory, self._peer, self._lane)

    def cancel(self) -> None:
        del self._memory
        if self._lane is not None:
            self._lane.close()


class _ShmReceiveLink(ReceiveLink):
    def __init__(self, memory: torch.Tensor, peer: str, lane: Lane | None) -> None:
        self.lane = lane
        self._memory: torch.Tensor | None = memory
        self._peer = peer

    def fetch(self, locator: str, num_bytes: int, deadline_s: float) -> torch.Tensor:
        del deadline_s
        memory = self._memory
        if memory is None:
            raise HandoverError(f"link to {self._peer} is closed")
        if not _DECIMAL.fullmatch(locator) or num_bytes <= 0 or int(locator) + num_bytes > memory.numel():
            raise HandoverError(
                f"{self._peer} offers {num_bytes} bytes at {locator[:32]!r}, outside of its segment of "
                f"{memory.numel()} bytes"
            )
        return memory[int(locator) : int(locator) + num_bytes]

    def discard(self, locator: str, num_bytes: int, deadline_s: float) -> None:
        del locator, num_bytes, deadline_s

    def close(self) -> None:
        self._memory = None
        if self.lane is not None:
            self.lane.close()


def _unlink(path: Path) -> None:
    with contextlib.suppress(FileNotFoundError):  # the other side was faster
        path.unlink()
