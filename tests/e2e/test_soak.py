"""A minute of the long run: every kind of fault that there is room for, and nothing lost, wrong, leaked or grown."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(290)]

ROOT = Path(__file__).parent.parent.parent


def test_a_minute_with_a_fault_every_five_seconds() -> None:
    command = [sys.executable, str(ROOT / "bench" / "soak.py"), "--minutes", "1", "--every-s", "5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stdout[-12_000:] + done.stderr[-4000:]
    assert "every promise was kept" in done.stdout
