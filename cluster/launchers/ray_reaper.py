"""Ends what is left of a private Ray, however `baton up` ended. Run as a script: `ray_reaper.py MARK FOLDER`.

It waits for the end of its standard input, which comes when `baton up` closes it or dies, then kills every process
that carries MARK in its environment or uses FOLDER, except `baton up`, and removes FOLDER. Ray's own agents would
outlive a killed parent by a minute.
Only the standard library is used, so that it costs little and depends on nothing that may be gone.
"""

from __future__ import annotations

import os
import shutil
import signal
import sys
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

__all__ = ["main"]

_DEADLINE_S = 10.0
_PAUSE_S = 0.1


def marked(mark: str, folder: Path | None = None, spared: Collection[int] = ()) -> list[int]:
    """Other processes of this user whose environment holds `mark`, or with a file of `folder` open; no zombies.

    Open files, because a process that sets its title, as Ray's agents do, writes over its own environment.
    """
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdecimal() and int(process.name) not in (os.getpid(), *spared):
            # Processes come and go, and those of others are not ours to read.
            with suppress(OSError):
                is_marked = mark.encode() in (process / "environ").read_bytes().split(b"\0")
                if is_marked or (folder is not None and _uses(process, folder)):
                    found.append(int(process.name))
    return found


def _uses(process: Path, folder: Path) -> bool:
    prefix = f"{folder}/"
    for descriptor in (process / "fd").iterdir():
        with suppress(FileNotFoundError):
            if str(descriptor.readlink()).startswith(prefix):
                return True
    return False


def main(mark: str, folder: Path) -> int:
    """Returns 1 when something could not be ended within 10 s."""
    parent = os.getppid()
    sys.stdin.read()
    until_s = time.monotonic() + _DEADLINE_S
    while pids := marked(mark, folder, [parent]):
        if time.monotonic() >= until_s:
            return 1
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(_PAUSE_S)
    shutil.rmtree(folder, ignore_errors=True)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2])))
