"""The files that a bench reads and writes, all of them looked at before anything is measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import orjson
from rich.console import Console

from baton.cluster.loadgen.plan import Point
from baton.cluster.loadgen.plot import check_can_plot, write_plot
from baton.cluster.loadgen.records import Record
from baton.cluster.loadgen.report import print_comparison
from baton.cluster.loadgen.result import Result
from baton.cluster.loadgen.trace import TraceRow, read_trace
from baton.errors import ConfigError

__all__ = ["BenchFiles", "compare_files", "load_trace"]


@dataclass(frozen=True, slots=True, kw_only=True)
class BenchFiles:
    """Where results go; None writes nothing."""

    json: Path | None = None
    plot: Path | None = None
    records: Path | None = None

    def check(self) -> None:
        """Raises:
        ConfigError: a folder is missing, or matplotlib is.
        """
        for option, path in (("--json", self.json), ("--plot", self.plot), ("--records", self.records)):
            if path is not None and not path.absolute().parent.is_dir():
                raise ConfigError(f"{option} {path}: there is no folder {path.parent}")
        if self.plot is not None:
            check_can_plot()
        if self.records is not None:
            self.records.write_bytes(b"")

    def add_records(self, point: Point, records: Sequence[Record]) -> None:
        """Append a line for each request of a point."""
        if self.records is not None:
            with self.records.open("ab") as file:
                file.writelines(orjson.dumps({"point": point.label, **each.as_dict()}) + b"\n" for each in records)

    def write(self, result: Result) -> None:
        """The JSON and the picture."""
        if self.json is not None:
            self.json.write_text(result.to_json(), encoding="utf-8")
        if self.plot is not None:
            write_plot(result, self.plot)


def load_trace(path: Path, limit: int) -> list[TraceRow]:
    """The first `limit` rows of a trace.

    Raises:
        ConfigError: the file cannot be read, or is no trace.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            return read_trace(lines, name=path.name, limit=limit)
    except OSError as error:
        raise ConfigError(f"--trace {path}: {error.strerror}") from error


def compare_files(first: Path, second: Path) -> None:
    """Print two results side by side.

    Raises:
        ConfigError: a file that is missing or no result.
    """
    results = []
    for path in (first, second):
        try:
            results.append(Result.from_json(path.read_text(encoding="utf-8"), path.name))
        except OSError as error:
            raise ConfigError(f"--compare {path}: {error.strerror}") from error
    names = (first.name, second.name) if first.name != second.name else (str(first), str(second))
    print_comparison(results[0], results[1], names, Console())
