"""How much memory a process may still take on this host: no torch."""

from __future__ import annotations

from pathlib import Path

__all__ = ["available_host_bytes"]

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
