"""Aligned columns of text. Pure."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["columns"]


def columns(rows: Sequence[Sequence[str]], *, left: int = 1, gap: str = "  ") -> list[str]:
    """A line for each row, each column as wide as its widest cell.

    Args:
        rows: of equal length.
        left: so many columns are aligned to the left, the others to the right, but for a last one of words: where its
            first cell, its head, is empty.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    last = len(widths) - 1 if rows[0] and not rows[0][-1] else len(widths)
    return [
        gap.join(
            cell.ljust(width) if place < left or place == last else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
