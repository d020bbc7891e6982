"""How much memory a process may still take on this host, and what it gives back: no torch."""

from __future__ import annotations

import ctypes
from pathlib import Path

__all__ = ["available_host_bytes", "release_freed_memory"]

_UNKNOWN_BYTES = 2 << 30
_MEMINFO = Path("/proc/meminfo")
_CGROUP = Path("/sys/fs/cgroup")


def available_host_bytes() -> int:
    """Memory that this process may still take: the host's, or its container's where that is less."""
    available = _UNKNOWN_BYTES
    if _MEMINFO.exists():
        fields = dict(line.split(":", 1) for line in _MEMINFO.read_text().splitlines())
        available = int(fields["MemAvailable"].split()[0]) * 1024
    limit_file, current_file = _CGROUP / "memory.max", _CGROUP / "memory.current"
    if limit_file.exists() and current_file.exists():
        limit = limit_file.read_text().strip()
        if limit != "max":
            available = min(available, max(0, int(limit) - int(current_file.read_text())))
    return available


def release_freed_memory() -> None:
    """Gives memory that was freed back to the system, where the C library keeps it (glibc); takes milliseconds.

    Loading a checkpoint frees a copy of every tensor, in sizes that glibc expects to be asked for again.
    """
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
