"""Where controllers wait for the end of a rank: those of the newest generation.

    watch(1) waits ... watch(2) comes -> 1 is told that it was replaced, 2 waits ... end(text) -> 2 is told
    watch(1), however late it arrives, is told so at once
    watch(3) after the end -> 3 is told the end at once

A controller that Ray replaced may still be there for a moment; the answer tells it that its time is over.
"""

from __future__ import annotations

import threading

__all__ = ["WatchPoint"]


class WatchPoint:
    """Thread-safe."""

    def __init__(self) -> None:
        self.generation = 0
        self._changed = threading.Condition()
        self._end: str | None = None

    def end(self, text: str) -> None:
        """The rank has ended: well, where `text` is empty, or why."""
        with self._changed:
            self._end = text
            self._changed.notify_all()

    def watch(self, generation: int) -> tuple[bool, str]:
        """Wait for the end: (True, how), or (False, "") where a watcher of a later generation came.

        Waits as long as the rank lives; who calls notices when its process does not.
        """
        with self._changed:
            if self._end is None and generation > self.generation:
                self.generation = generation
                self._changed.notify_all()
            while self._end is None and self.generation == generation:
                self._changed.wait()
            return (True, self._end) if self._end is not None else (False, "")
