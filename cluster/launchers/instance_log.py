"""Where the output of instances goes, and the last of it.

    <instance>.log           of an instance of one rank; of several, there the launcher notes how each start ended
    <instance>-rank<r>.log   rank r of an instance of several

Each machine keeps the logs of the ranks that run there.
"""

from __future__ import annotations

import time
from pathlib import Path

__all__ = ["log_name", "log_path", "log_tail", "note_end"]

_TAIL_BYTES = 65_536
_NOTED_LINES = 12


def log_name(instance_id: str, rank: int, num_ranks: int) -> str:
    """Name of a rank's log, without its suffix."""
    return instance_id if num_ranks == 1 else f"{instance_id}-rank{rank}"


def log_path(log_dir: Path, name: str) -> Path:
    """The file of the log `name`: an instance id, or what `log_name` gives."""
    return log_dir / f"{name}.log"


def log_tail(log_dir: Path, name: str, num_lines: int) -> list[str]:
    """The last non-empty lines of the log `name`; none when there is no such log here."""
    try:
        with log_path(log_dir, name).open("rb") as file:
            file.seek(0, 2)
            file.seek(max(0, file.tell() - _TAIL_BYTES))
            lines = file.read().decode("utf-8", "replace").splitlines()
    except FileNotFoundError:
        return []
    return [line for line in lines if line.strip()][-num_lines:]


def note_end(log_dir: Path, instance_id: str, rank: int, num_ranks: int, text: str) -> None:
    """Write into the log of an instance of several ranks how it ended, with the end of that rank's own log."""
    if num_ranks == 1:
        return
    name = log_name(instance_id, rank, num_ranks)
    tail = log_tail(log_dir, name, _NOTED_LINES)
    shown = "".join(f"    {line}\n" for line in tail) or "    (nothing on this machine)\n"
    now = time.strftime("%H:%M:%S")
    with log_path(log_dir, instance_id).open("a", encoding="utf-8") as file:
        file.write(f"{now} {instance_id} ended: {text}\n  the end of {name}.log:\n{shown}")
