"""Buffers that a receiver uses again: making one anew costs page faults, or a call of the GPU's driver."""

from __future__ import annotations

import threading
from collections.abc import Callable

import torch

__all__ = ["SpareBuffers"]

_MAX_SPARE = 2


class SpareBuffers:
    """Keeps the largest few that were given back. Thread-safe.

    Args:
        make: (num_bytes) -> uint8 [num_bytes]; may raise.
    """

    def __init__(self, make: Callable[[int], torch.Tensor]) -> None:
        self._make = make
        self._lock = threading.Lock()
        self._spare: list[torch.Tensor] = []
        self._is_closed = False

    def take(self, num_bytes: int) -> torch.Tensor:
        """uint8 [num_bytes], contiguous, of any content."""
        with self._lock:
            for i, spare in enumerate(self._spare):
                if _capacity_bytes(spare) >= num_bytes:
                    return self._spare.pop(i).as_strided((num_bytes,), (1,), 0)
        return self._make(num_bytes)

    def give_back(self, buffer: torch.Tensor) -> None:
        """The caller, and everything that it has started, has finished with a buffer."""
        with self._lock:
            if not self._is_closed:
                self._spare.append(buffer)
                self._spare.sort(key=_capacity_bytes)
                del self._spare[:-_MAX_SPARE]

    def close(self) -> None:
        """Keep nothing any more."""
        with self._lock:
            self._is_closed = True
            self._spare.clear()


def _capacity_bytes(buffer: torch.Tensor) -> int:
    return buffer.untyped_storage().nbytes()
