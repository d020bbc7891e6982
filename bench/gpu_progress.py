"""How far a benchmark is: a bar that is drawn over on a terminal, a line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time

__all__ = ["Progress"]

_EVERY_S = {True: 0.1, False: 5.0}
_BAR = 24


class Progress:
    """Writes to stderr, so that the table on stdout stays whole.

    Args:
        total: steps that there are.
    """

    def __init__(self, total: int) -> None:
        self._total = max(1, total)
        self._done = 0
        self._terminal = sys.stderr.isatty()
        self._begin_s = self._told_s = time.monotonic()

    def step(self, what: str) -> None:
        """The step `what` begins."""
        now_s = time.monotonic()
        if self._done == 0 or now_s - self._told_s >= _EVERY_S[self._terminal]:
            self._told_s = now_s
            filled = _BAR * self._done // self._total
            bar = "#" * filled + "." * (_BAR - filled)
            text = f"[{bar}] {self._done}/{self._total} {now_s - self._begin_s:4.0f} s  {what}"
            print(f"\r\x1b[2K{text}" if self._terminal else text, end="" if self._terminal else "\n", file=sys.stderr)
            sys.stderr.flush()
        self._done += 1

    def end(self) -> None:
        """Nothing is drawn any more."""
        if self._terminal:
            print("\r\x1b[2K", end="", file=sys.stderr, flush=True)
