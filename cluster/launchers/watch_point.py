"""Where controllers wait for the end of a rank: one at a time, the newest.

    watch(A) waits ... watch(B) comes -> A is told that it was replaced, B waits ... end(text) -> B is told
    watch(C) after the end -> C is told at once

A controller that Ray replaced may still be there for a moment; the answer tells it that its time is over.
"""

from __future__ import annotations

import threading

__all__ = ["WatchPoint"]


class WatchPoint:
    """Thread-safe."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._watcher = ""
        self._end: str | None = None

    def end(self, text: str) -> None:
        """The rank has ended: well, where `text` is empty, or why."""
        with self._changed:
            self._end = text
            self._changed.notify_all()

    def watch(self, watcher: str) -> tuple[bool, str]:
        """Wait for the end: (True, how), or (False, "") once another watcher came.

        Waits as long as the rank lives; who calls notices when its process does not.
        """
        with self._changed:
            if self._end is None:
                self._watcher = watcher
                self._changed.notify_all()
            while self._end is None and self._watcher == watcher:
                self._changed.wait()
            return (True, self._end) if self._end is not None else (False, "")
