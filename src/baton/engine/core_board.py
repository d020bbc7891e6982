"""A worker's claim to cores of its host, on a board in shared memory that all workers of a cluster there read.

    claim()  --[lock: drop dead claims, take a slot, share the cores out anew]-->  CoreClaim
                 .attach()   the kernels' threads keep to it from now on
                 .release()  --[lock: share out anew, remove the board with its last claim]

The board tells who owns which core and whether that worker works at this moment; kernels/cpu/cores.h has its layout and
how an idle worker's core is lent and given back. A worker that dies stops counting as working after 2 s, and its claim
goes with the next claim or release. Workers of one cluster and user meet at one file name; its lock is held briefly.
"""

from __future__ import annotations

import contextlib
import fcntl
import logging
import mmap
import os
import struct
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from baton.engine.core_plan import Place, plan_cores
from baton.kernels import ops

__all__ = ["CoreClaim", "at_work", "claim_cores"]

_log = logging.getLogger(__name__)
_FOLDER = Path("/dev/shm")
_MAGIC = 0x31736572_6F634E42
_LINE = 64
_MAX_CORES, _MAX_SLOTS = 256, 64
_SLOTS_AT = (1 + _MAX_CORES) * _LINE
_SIZE = _SLOTS_AT + _MAX_SLOTS * _LINE
_SLOT = struct.Struct("=QQqqQ")  # pid (0: free), place, idle since, beat, start of the process in clock ticks
_WORD = struct.Struct("=Q")
_ATTEMPTS = 10


class CoreClaim:
    """One process's slot on the board at `path`; it ends with `release`, or with the process.

    Args:
        host_cores, cores_of_group: as for `plan_cores`; the same in all processes of the cluster on this host.
    """

    def __init__(
        self, path: Path, place: Place, host_cores: Sequence[int], cores_of_group: Mapping[int, Sequence[int]]
    ) -> None:
        self._path = path
        self._host_cores = [core for core in host_cores if core < _MAX_CORES]
        self._cores_of_group = cores_of_group
        self.place = place
        self.slot = -1
        with self._locked() as board:
            free = [slot for slot in range(_MAX_SLOTS) if slot not in _live(board)]
            if not free or not self._host_cores:
                return
            self.slot = free[0]
            _SLOT.pack_into(board, _at(self.slot), os.getpid(), place.pack(), 1, 0, _born(os.getpid()))
            self._share_out(board)

    @property
    def cores(self) -> tuple[int, ...]:
        """What this worker owns at this moment; changes as others come and go."""
        if self.slot < 0:
            return ()
        with self._locked() as board:
            bit = 1 << self.slot
            return tuple(core for core in self._host_cores if _WORD.unpack_from(board, _LINE * (1 + core))[0] & bit)

    def attach(self, max_threads: int | None = None) -> None:
        """From now on the kernels' threads keep to the board, and to `max_threads` at once where given."""
        if self.slot >= 0:
            ops.attach_cores(str(self._path), self.slot, max_threads or _MAX_CORES)

    def release(self) -> None:
        """Gives the cores up. The board goes with its last claim. May be called again."""
        if self.slot < 0:
            return
        ops.detach_cores()
        with self._locked() as board:
            board[_at(self.slot) : _at(self.slot) + _LINE] = bytes(_LINE)
            self.slot = -1
            if not self._share_out(board):
                self._path.unlink(missing_ok=True)

    def _share_out(self, board: mmap.mmap) -> bool:
        """Writes every core's owners; returns whether there is any worker."""
        live = _live(board)
        plan = plan_cores(live.values(), self._host_cores, self._cores_of_group) if live else {}
        for core in range(_MAX_CORES):
            mask = sum(1 << slot for slot, place in live.items() if core in plan[place])
            _put(board, _LINE * (1 + core), mask)
        _put(board, _WORD.size, _WORD.unpack_from(board, _WORD.size)[0] + 1)
        return bool(live)

    @contextlib.contextmanager
    def _locked(self) -> Iterator[mmap.mmap]:
        for _ in range(_ATTEMPTS):
            file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
            try:
                # Held for microseconds, and the system drops it with its holder.
                fcntl.flock(file, fcntl.LOCK_EX)
                if os.fstat(file).st_nlink == 0:
                    continue  # removed with its last claim while we waited: make a new one
                if os.fstat(file).st_size != _SIZE:
                    os.ftruncate(file, 0)
                    os.ftruncate(file, _SIZE)
                with mmap.mmap(file, _SIZE) as board:
                    _put(board, 0, _MAGIC)
                    yield board
                return
            finally:
                os.close(file)
        raise OSError(f"{self._path} was removed {_ATTEMPTS} times while it was being opened")


def claim_cores(
    cluster_name: str, place: Place, host_cores: Sequence[int], cores_of_group: Mapping[int, Sequence[int]]
) -> CoreClaim | None:
    """A claim for this process, or None where the host has no shared memory to put a board in."""
    try:
        return CoreClaim(_FOLDER / f"baton-{os.getuid()}-{cluster_name}.cores", place, host_cores, cores_of_group)
    except OSError as error:
        _log.warning("no board of cores (%s): this worker's threads are not pinned and borrow no cores", error)
        return None


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """Within it the calling thread computes: on its own cores, and on those that idle workers lend."""
    ops.enter_cores()
    try:
        yield
    finally:
        ops.leave_cores()


def _put(board: mmap.mmap, at: int, value: int) -> None:
    """Writes a word that workers read without the lock: in one store, and not at all where it is there already.

    `Struct.pack_into` clears the word first, then writes it byte by byte: who attached at that moment found no magic.
    """
    if _WORD.unpack_from(board, at)[0] != value:
        with memoryview(board) as whole, whole.cast("Q") as words:
            words[at // _WORD.size] = value


def _at(slot: int) -> int:
    return _SLOTS_AT + slot * _LINE


def _live(board: mmap.mmap) -> dict[int, Place]:
    """Slots whose process lives; claims of dead ones are dropped."""
    live: dict[int, Place] = {}
    for slot in range(_MAX_SLOTS):
        pid, packed, _, _, born = _SLOT.unpack_from(board, _at(slot))
        if pid and _born(pid) == born:
            live[slot] = Place.unpack(packed)
        elif pid:
            board[_at(slot) : _at(slot) + _LINE] = bytes(_LINE)
    for core in range(_MAX_CORES):
        at = _LINE * (1 + core) + _WORD.size
        guests = _WORD.unpack_from(board, at)[0]
        if stale := guests & ~sum(1 << slot for slot in live):
            _put(board, at, guests & ~stale)
    return live


def _born(pid: int) -> int:
    """Start of process `pid` in clock ticks since boot; 0 where there is none. With the pid it names a process."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[19])
