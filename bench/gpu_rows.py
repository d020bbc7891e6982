"""Rows of GPU benchmarks: appended to CSV files with the machine they are of, and shown as a short table."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from gpu_device import Machine

__all__ = ["Row", "append", "latest", "table"]

Row = Mapping[str, str | int | float]


def append(path: Path, machine: Machine, columns: Sequence[str], rows: Sequence[Row]) -> None:
    """Adds `rows` to the CSV file at `path`, behind the columns of `machine`. Missing values stay empty.

    Raises:
        ValueError: the file has other columns, or a row has one that is not among `columns`.
    """
    heading = [*asdict(machine), *columns]
    text = io.StringIO()
    writer = csv.DictWriter(text, heading, lineterminator="\n")
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        writer.writeheader()
    else:
        with path.open(newline="", encoding="utf-8") as file:
            found = next(csv.reader(file), [])
        if found != heading:
            raise ValueError(f"{path} has the columns {', '.join(found)}; these rows have {', '.join(heading)}")
    for row in rows:
        writer.writerow({**asdict(machine), **{key: _text(value) for key, value in row.items()}})
    with path.open("a", newline="", encoding="utf-8") as file:
        file.write(text.getvalue())


def latest(path: Path, started: str) -> list[dict[str, str]]:
    """Rows of the CSV file that are dated at or after `started` (ISO, UTC); none where the file is not there."""
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return [row for row in csv.DictReader(file) if row["date"] >= started]


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    """Columns as wide as they need, numbers to the right."""
    cells = [[_text(row.get(column, "")) for column in columns] for row in rows]
    widths = [max([len(column), *(len(line[at]) for line in cells)]) for at, column in enumerate(columns)]
    is_number = [all(_is_number(line[at]) for line in cells) for at in range(len(columns))]
    lines = [
        "  ".join(
            cell.rjust(width) if number else cell.ljust(width)
            for cell, width, number in zip(line, widths, is_number, strict=True)
        ).rstrip()
        for line in [list(columns), *cells]
    ]
    return "\n".join(lines)


def _text(value: str | int | float) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _is_number(text: str) -> bool:
    return not text or text.removesuffix("%").replace(".", "").replace("-", "").replace("e+", "").isdigit()
