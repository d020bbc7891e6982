"""CPU time of processes and threads, from the scheduler's own nanosecond counts."""

from __future__ import annotations

import contextlib
from pathlib import Path

__all__ = ["cpu_s", "thread_kind"]


def cpu_s(pid: int) -> dict[int, float]:
    """CPU seconds of each thread of a process."""
    spent = {}
    for task in Path(f"/proc/{pid}/task").iterdir():
        # One may end between the list and the look.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            spent[int(task.name)] = int((task / "schedstat").read_text().split()[0]) * 1e-9
    return spent


def thread_kind(pid: int, thread: int) -> str:
    """What a thread is for, by its name."""
    if thread == pid:
        return "event loop"
    with contextlib.suppress(FileNotFoundError):
        return Path(f"/proc/{pid}/task/{thread}/comm").read_text().strip() + " threads"
    return "ended threads"
