"""The page about metrics is that of the code."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_the_page_is_that_of_the_code() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "tools" / "gen_metrics_doc.py"), "--check"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
