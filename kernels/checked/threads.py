"""Threads and cores of the C++ library; they mean nothing to the other backends."""

from __future__ import annotations

import torch

from baton.kernels.backends import cpu_library

__all__ = [
    "attach_cores",
    "detach_cores",
    "enter_cores",
    "helped_items",
    "leave_cores",
    "num_threads",
    "set_num_threads",
]


def set_num_threads(num_threads: int) -> None:
    """Let the CPU library use up to `num_threads` threads per call, the caller's included; 1, the start, makes none.

    The reference runs on torch's threads and is not affected.
    """
    if not 1 <= num_threads <= 256:
        raise ValueError(f"num_threads must be in [1, 256], got {num_threads}")
    if (native := cpu_library()) is not None:
        native.set_num_threads(num_threads)


def num_threads() -> int:
    """Threads per call of the active backend; for the reference, torch's own."""
    native = cpu_library()
    return torch.get_num_threads() if native is None else native.num_threads()


def attach_cores(path: str, slot: int, max_threads: int) -> None:
    """Keep the CPU library's threads to the cores that the board at `path` gives to `slot` and to those that are lent.

    From then on only the thread that has called `enter_cores` is helped by others. The reference is not affected.

    Raises:
        ValueError: the file is not such a board.
    """
    if (native := cpu_library()) is not None:
        native.attach_cores(path, slot, max_threads)


def detach_cores() -> None:
    """End `attach_cores`."""
    if (native := cpu_library()) is not None:
        native.attach_cores(None, 0, 1)


def enter_cores() -> None:
    """The calling thread works from now on: it moves to its cores, and guests leave them. Cheap where it does already.

    Without a board, nothing happens.
    """
    if (native := cpu_library()) is not None:
        native.enter_cores()


def leave_cores() -> None:
    """The calling thread has nothing to do: others may borrow its cores."""
    if (native := cpu_library()) is not None:
        native.leave_cores()


def helped_items() -> int:
    """Pieces of work that helper threads have done since the process began; 0 for the reference."""
    native = cpu_library()
    return 0 if native is None else native.helped_items()
