"""One engine on a GPU: decode steps, prefills, handovers between two processes, and what others need for the same.

    python bench/engine.py [--device cuda] [--budget-s 110] [--parts steps,handover,transformers,vllm]

Each part runs in a process of its own, so that none finds memory that another has left taken, within its share of the
time (`gpu_steps.py`, `handover.py`, `gpu_peers.py` say what they measure). Rows go to docs/benchmarks/gpu_engine.csv on
a GPU, or where --csv says. On a CPU the same runs with a tiny shape, to be tested; its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import gpu_rows
from gpu_device import Timer, describe, measure_roof, resolve_device

HERE = Path(__file__).parent
CSV = HERE.parent / "docs" / "benchmarks" / "gpu_engine.csv"
COLUMNS = (
    "kind",
    "batch",
    "context",
    "shared_prefix",
    "step_ms",
    "host_ms",
    "tok_s",
    "floor_ms",
    "of_floor",
    "tflop_s",
    "matmul_share",
    "payload_mib",
    "gb_s",
    "copy_share",
    "note",
)
SHARES = {"steps": 0.62, "handover": 0.14, "transformers": 0.16, "vllm": 0.08}
"""Of the time that is left, for a part and those after it."""


def commands(device: str, out: Path, small: bool) -> dict[str, list[str]]:
    """How each part is run."""
    tiny = ["--small"] if small else []
    is_cuda = device.startswith("cuda")
    transport = ["--transports", "cuda_ipc" if is_cuda else "shm", "--device", "cuda" if is_cuda else "cpu"]
    sizes = [] if is_cuda and not small else ["--bytes", str(1 << 20), str(4 << 20)]
    own = ["--device", device, *tiny]
    return {
        "steps": [str(HERE / "gpu_steps.py"), str(out), *own],
        "handover": [str(HERE / "handover.py"), "--json", str(out), "--rounds", "8", *transport, *sizes],
        "transformers": [str(HERE / "gpu_peers.py"), str(out), "transformers", *own],
        "vllm": [str(HERE / "gpu_peers.py"), str(out), "vllm", *own],
    }


def run_part(name: str, command: list[str], out: Path, budget_s: float) -> tuple[list[Any], str]:
    """What a part has written, and why it has not; it is ended, with all it started, when its time is over."""
    takes_budget = name != "handover"
    arguments = [sys.executable, *command, *(["--budget-s", f"{0.8 * budget_s:.0f}"] if takes_budget else [])]
    process = subprocess.Popen(
        arguments,
        stdout=subprocess.PIPE,
        stderr=None if sys.stderr.isatty() else subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=budget_s)
    except subprocess.TimeoutExpired:
        return [], f"not done within {budget_s:.0f} s"
    finally:
        # Also what the part may have started.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(10.0)
    if process.returncode:
        lines = (said or "").strip().splitlines()
        print("\n".join(lines[-15:]), file=sys.stderr)
        return [], f"ended with code {process.returncode}: {lines[-1] if lines else 'it said nothing'}"
    return json.loads(out.read_text()), ""


def handover_rows(found: list[dict[str, Any]], copy_bytes_s: float) -> list[gpu_rows.Row]:
    """Rows of `handover.py`'s table. A payload's byte is read and written twice: into the arena and out of it."""
    rows: list[gpu_rows.Row] = []
    for one in found:
        for kind in ("raw", "handover"):
            seconds = one[f"{kind}_s"]
            rows.append(
                {
                    "kind": f"{kind} {one['transport']}",
                    "payload_mib": one["num_bytes"] / (1 << 20),
                    "step_ms": seconds * 1e3,
                    "gb_s": one["num_bytes"] / seconds / 1e9,
                    "copy_share": 4 * one["num_bytes"] / seconds / copy_bytes_s,
                }
            )
    return rows


def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 where a part failed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--budget-s", type=float, default=110.0)
    parser.add_argument("--parts", default=",".join(SHARES), help=f"of {', '.join(SHARES)}")
    parser.add_argument("--small", action="store_true", help="the shape of tests, also on a GPU")
    parser.add_argument("--csv", type=Path, help=f"append rows here; on a GPU, {CSV.name} without being told")
    options = parser.parse_args(arguments)
    parts = options.parts.split(",")
    if unknown := set(parts) - set(SHARES):
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    end_s = time.monotonic() + options.budget_s
    device = resolve_device(options.device)
    machine = describe(device)
    copy_bytes_s = measure_roof(Timer(device, budget_s=0.05), device).copy_bytes_s
    if device.type == "cuda":
        torch.cuda.empty_cache()
    rows: list[gpu_rows.Row] = []
    failures: dict[str, str] = {}
    for index, part in enumerate(parts):
        left_s = end_s - time.monotonic()
        share = SHARES[part] / sum(SHARES[later] for later in parts[index:])
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder) / "rows.json"
            command = commands(str(device), out, options.small)[part]
            found, failure = run_part(part, command, out, max(5.0, share * left_s))
        rows += handover_rows(found, copy_bytes_s) if part == "handover" else found
        if failure:
            failures[part] = failure
    csv = options.csv or (CSV if device.type == "cuda" and not options.small else None)
    if csv is not None:
        gpu_rows.append(csv, machine, COLUMNS, rows)
    print(
        f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, {machine.revision}:"
        f" copy {copy_bytes_s / 1e9:.0f} GB/s"
    )
    used = [column for column in COLUMNS if any(column in row for row in rows)]
    print(gpu_rows.table(used, rows))
    for part, failure in failures.items():
        print(f"{part} FAILED: {failure}")
    return 1 if failures else 0


if __name__ == "__main__":
    raise SystemExit(main())
