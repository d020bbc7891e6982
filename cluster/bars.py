"""Bars on a terminal, nothing elsewhere: what everything that shows how far it is has in common."""

from __future__ import annotations

from types import TracebackType
from typing import Any, Self, TextIO

__all__ = ["Bars"]


class Bars:
    """Context manager. `_bars` is rich's progress display while it is open on a terminal, else None.

    Args:
        label_chars, bar_chars: widths of the two columns.
    """

    def __init__(self, stream: TextIO, *, label_chars: int, bar_chars: int) -> None:
        self._stream = stream
        self._label_chars, self._bar_chars = label_chars, bar_chars
        self._bars: Any = None

    def __enter__(self) -> Self:
        if self._stream.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bars = Progress(
                TextColumn(f"{{task.description:<{self._label_chars}}}"),
                BarColumn(bar_width=self._bar_chars),
                TextColumn("{task.fields[detail]}"),
                TimeElapsedColumn(),
                console=Console(file=self._stream),
            )
            self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bars is not None:
            self._bars.stop()
