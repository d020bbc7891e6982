"""The machine and the software that figures come from, for the result's JSON."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from pathlib import Path
from typing import Any

__all__ = ["describe_machine", "describe_versions"]


def describe_machine() -> dict[str, Any]:
    """Processor, cores this process may use, memory."""
    return {
        "processor": _value("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory": _value("/proc/meminfo", "MemTotal"),
        "system": f"{platform.system()} {platform.release()}",
    }


def describe_versions() -> dict[str, str]:
    """Of Baton, Python, and what the generator stands on."""
    import baton

    versions = {"baton": baton.__version__, "python": platform.python_version()}
    return versions | {name: importlib.metadata.version(name) for name in ("grpcio", "httptools", "numpy", "uvloop")}


def _value(path: str, key: str) -> str:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return ""
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith(key)), "")
