"""A worker process on a board of cores, told what to do line by line. Run by test_core_board.py."""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import torch

from baton.engine.core_board import CoreClaim, at_work
from baton.engine.core_plan import Place
from baton.kernels import ops

_ROWS, _DIM = 400, 4096


def work(seconds: float) -> dict[str, Any]:
    """Computes for so long; what helpers did, whether all results were right, where this thread may run, when it was.

    Says on a line of its own when it begins.
    """
    x, weight = torch.randn(_ROWS, _DIM), torch.randn(_DIM)
    expected = ops.rms_norm(x, weight, 1e-5)
    before, right, steps, longest_s = ops.helped_items(), True, 0, 0.0
    with at_work():
        began_s = time.monotonic()
        print(json.dumps({"began": True}), flush=True)
        end_s = began_s + seconds
        while (begin_s := time.monotonic()) < end_s:
            found = ops.rms_norm(x, weight, 1e-5)
            longest_s = max(longest_s, time.monotonic() - begin_s)
            right = right and torch.equal(found, expected)
            steps += 1
        cores = sorted(os.sched_getaffinity(0))
    helped = ops.helped_items() - before
    told = {"helped": helped, "right": right, "steps": steps, "longest_s": longest_s, "cores": cores}
    return told | {"began_s": began_s, "ended_s": end_s}


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    path, group, host_cores = Path(sys.argv[1]), int(sys.argv[2]), json.loads(sys.argv[3])
    claim = CoreClaim(path, Place(group), host_cores, {})
    claim.attach(int(sys.argv[4]) if len(sys.argv) > 4 else None)
    print(json.dumps({"slot": claim.slot}), flush=True)
    for line in sys.stdin:
        command, *arguments = line.split()
        if command == "work":
            answer: dict[str, Any] = work(float(arguments[0]))
        elif command == "enter":
            ops.enter_cores()
            answer = {}
        elif command == "leave":
            ops.leave_cores()
            answer = {}
        else:
            assert command == "cores", command
            answer = {"cores": claim.cores}
        print(json.dumps(answer), flush=True)
    claim.release()


if __name__ == "__main__":
    main()
