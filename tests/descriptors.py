"""Files and sockets that this process has open."""

from __future__ import annotations

import os

__all__ = ["descriptors"]


def descriptors() -> int:
    """How many there are."""
    return len(os.listdir("/proc/self/fd"))
