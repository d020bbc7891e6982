"""The benchmark of parallel layouts runs: its figures are not looked at, what it prints is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

_ROOT = Path(__file__).parents[2]


def test_quick_run_prints_every_table() -> None:
    core = str(min(os.sched_getaffinity(0)))
    command = [sys.executable, "bench/parallel.py", "src/baton/assets/tiny", "--quick", "--cores", core, core]
    done = subprocess.run(
        [*command, "--layouts", "1x1", "1x2"], cwd=_ROOT, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    for text in ("1 x 1", "1 x 2", "bubble of stages", "one core", "in rank order"):
        assert text in done.stdout
    assert "Traceback" not in done.stderr
