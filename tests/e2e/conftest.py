"""Makes the helpers of the other test folders importable."""

from __future__ import annotations

import sys
from pathlib import Path

for folder in ("e2e", "engine"):
    sys.path.insert(0, str(Path(__file__).parent.parent / folder))
