"""The machine that a benchmark runs on: what it is, and whether others use its cores meanwhile (Linux only).

Figures of a busy machine are worth little: `others_cores` looks while nothing of ours runs, `stolen_share` at what the
hypervisor took away meanwhile.
"""

from __future__ import annotations

import os
import platform
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

__all__ = ["CpuTimes", "describe_machine", "others_cores"]

_IDLE = (3, 4)  # idle, iowait
_STEAL = 7
_COUNTED = 8  # guest times, behind these, are in user time already


@dataclass(frozen=True, slots=True)
class CpuTimes:
    """Ticks of all cores together since the machine started."""

    busy: int
    stolen: int
    total: int

    @classmethod
    def now(cls) -> CpuTimes:
        """Of this moment; zeros where /proc/stat is not."""
        return cls.of(_read("/proc/stat"))

    @classmethod
    def of(cls, stat: str) -> CpuTimes:
        """From the text of /proc/stat."""
        for line in stat.splitlines():
            if line.startswith("cpu "):
                ticks = [int(part) for part in line.split()[1 : 1 + _COUNTED]]
                total = sum(ticks)
                return cls(total - sum(ticks[i] for i in _IDLE) - ticks[_STEAL], ticks[_STEAL], total)
        return cls(0, 0, 0)

    def busy_share(self, before: CpuTimes) -> float:
        """Of all cores, since `before`."""
        return (self.busy - before.busy) / max(1, self.total - before.total)

    def stolen_share(self, before: CpuTimes) -> float:
        """Of all cores, since `before`."""
        return (self.stolen - before.stolen) / max(1, self.total - before.total)


def others_cores(seconds: float = 1.0) -> float:
    """How many cores are in use while this process sleeps."""
    before = CpuTimes.now()
    time.sleep(seconds)
    return CpuTimes.now().busy_share(before) * (os.cpu_count() or 1)


def describe_machine() -> dict[str, Any]:
    """What figures depend on."""
    models = [
        line.split(":")[1].strip() for line in _read("/proc/cpuinfo").splitlines() if line.startswith("model name")
    ]
    return {
        "processor": models[0] if models else platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _read(path: str) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""
