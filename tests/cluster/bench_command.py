"""Runs `baton bench` in this process, for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from typer.testing import CliRunner

from baton.cluster.cli import app
from baton.cluster.loadgen.result import Result

__all__ = ["bench"]


def bench(url: str, folder: Path, *options: str) -> tuple[Any, Result, list[dict[str, Any]]]:
    """`baton bench URL ...`: what it printed, its JSON and its records."""
    files = ["--json", str(folder / "r.json"), "--records", str(folder / "r.jsonl")]
    done = CliRunner().invoke(app, ["bench", url, *options, *files])
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    records = [json.loads(line) for line in (folder / "r.jsonl").read_text().splitlines()]
    return done, Result.from_json((folder / "r.json").read_text(), "r.json"), records
