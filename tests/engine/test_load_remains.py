"""What loading took goes back: memory to the system, torch's threads to one."""

from __future__ import annotations

import json
import subprocess
import sys

from baton.kernels import ops

_CHILD = """
import json, re, threading, torch
from pathlib import Path
from baton.engine.load_remains import give_back_load_remains

def held_bytes():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024

torch.set_num_threads(2)
# Freed between pieces that stay, in a size that glibc has learned to keep.
torch.ones(20 << 20, dtype=torch.uint8)
pieces = [torch.ones(8 << 20, dtype=torch.uint8) for _ in range(16)]
kept = pieces[1::2]
del pieces
before = held_bytes()
give_back_load_remains()
seen = []
thread = threading.Thread(target=lambda: seen.append(torch.get_num_threads()))
thread.start()
thread.join()
print(json.dumps([before - held_bytes(), seen[0]]))
"""


def test_freed_memory_and_threads_go_back() -> None:
    done = subprocess.run([sys.executable, "-c", _CHILD], capture_output=True, text=True, timeout=60, check=True)
    given_back, num_threads = json.loads(done.stdout)
    assert given_back >= 32 << 20
    assert num_threads == (2 if ops.backend() == "reference" else 1)
