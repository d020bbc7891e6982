"""What the kernels' thread pool costs, and how soon a lent core is back: one region's time, and the hand-back.

    python bench/cores.py                # needs two cores; run it on an idle machine

A region is one parallel call over rows whose work is about 40, 100 and 200 us on one thread. "back to back" is what the
operators of a step do; "after 200 us" finds the helpers asleep. The hand-back is measured from the moment a second
process begins to work until the guest has left its core, while the first computes without a pause.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from baton.engine.core_board import CoreClaim, at_work
from baton.engine.core_plan import Place
from baton.kernels import ops

_DIM = 8192
_REPEATS = 300


def region_us(rows: int, pause_us: float) -> list[float]:
    """Times of parallel calls, sorted."""
    gate_up = torch.randn(rows, 2 * _DIM).bfloat16()
    times = []
    for _ in range(_REPEATS):
        begin = time.perf_counter_ns()
        ops.silu_mul(gate_up)
        times.append((time.perf_counter_ns() - begin) / 1e3)
        until = time.perf_counter_ns() + pause_us * 1e3
        while time.perf_counter_ns() < until:
            pass
    return sorted(times)


def pool_table() -> None:
    """Prints one line per size and pause."""
    for rows in (12, 30, 60):
        for pause_us, name in ((0, "back to back"), (200, "after 200 us")):
            medians = []
            for threads in (1, 2):
                ops.set_num_threads(threads)
                medians.append(statistics.median(region_us(rows, pause_us)))
            one, two = medians
            print(f"{name:13} 1 thread {one:7.1f} us, 2 threads {two:7.1f} us, over half {two - one / 2:6.1f} us")
    ops.set_num_threads(1)


def hand_back(cores: list[int]) -> None:
    """Prints how long an owner waits for its core."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        board = Path(folder) / "board"
        claim = CoreClaim(board, Place(0), cores, {})
        claim.attach(1)
        guest = subprocess.Popen([sys.executable, __file__, "--guest", str(board)], stdout=subprocess.PIPE, text=True)
        assert guest.stdout is not None
        guest.stdout.readline()
        times = []
        try:
            for _ in range(_REPEATS):
                time.sleep(0.005)
                begin = time.perf_counter_ns()
                with at_work():
                    times.append((time.perf_counter_ns() - begin) / 1e3)
                    time.sleep(0.002)
        finally:
            guest.terminate()
            guest.wait(timeout=20)
            claim.release()
    times.sort()
    print(f"hand-back     median {times[len(times) // 2]:.0f} us, p99 {times[-4]:.0f} us, longest {times[-1]:.0f} us")


def be_guest(board: Path, cores: list[int]) -> None:
    """Computes until it is ended."""
    claim = CoreClaim(board, Place(1), cores, {})
    claim.attach()
    gate_up = torch.randn(400, 2 * _DIM).bfloat16()
    print(json.dumps(claim.cores), flush=True)
    with at_work():
        while True:
            ops.silu_mul(gate_up)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--guest", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cores = sorted(os.sched_getaffinity(0))[:2]
    if options.guest:
        be_guest(options.guest, cores)
        return
    if len(cores) < 2:
        sys.exit("needs two cores")
    pool_table()
    hand_back(cores)


if __name__ == "__main__":
    main()
