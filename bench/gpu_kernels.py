"""Measures each GPU kernel and refuses to show a speed of one that is wrong; `bench/kernels.py` says how to run it."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import gpu_cases
import gpu_rows
from gpu_device import Machine, Roof, Timer, describe, measure_roof, resolve_device
from gpu_progress import Progress

COLUMNS = (
    "op",
    "config",
    "dtype",
    "us",
    "host_us",
    "gb_s",
    "copy_share",
    "tflop_s",
    "matmul_share",
    "roof_gb_s",
    "roof_tflop_s",
)
SHOWN = ("op", "config", "us", "host_us", "gb_s", "copy_share", "tflop_s", "matmul_share")
CSV = Path(__file__).parent.parent / "docs" / "benchmarks" / "gpu_kernels.csv"


def check_kernels(ops: Iterable[str], device: torch.device, failed: Iterable[str]) -> dict[str, str]:
    """What is wrong with each kernel that must not be measured."""
    problems = dict.fromkeys(failed, "its tests failed")
    for op in ops:
        check = gpu_cases.CHECKS.get(op)
        if op in problems or check is None:
            continue
        try:
            problem = check(device)
        except Exception as error:
            problem = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        if problem:
            problems[op] = problem
    return problems


def measure(case: gpu_cases.Case, timer: Timer, roof: Roof, dtype: torch.dtype) -> gpu_rows.Row:
    """One row."""
    timing = timer.time(case.make())
    gb_s, tflop_s = case.num_bytes / timing.device_s / 1e9, case.flops / timing.device_s / 1e12
    row: dict[str, str | int | float] = {
        "op": case.op,
        "config": case.config,
        "dtype": str(dtype).removeprefix("torch."),
        "us": timing.device_s * 1e6,
        "host_us": timing.host_s * 1e6,
        "gb_s": gb_s,
        "roof_gb_s": roof.copy_bytes_s / 1e9,
        "roof_tflop_s": roof.matmul_flops_s / 1e12,
    }
    if case.bound == "memory":
        row["copy_share"] = gb_s * 1e9 / roof.copy_bytes_s
    if case.flops:
        row["tflop_s"] = tflop_s
    if case.bound == "compute":
        row["matmul_share"] = tflop_s * 1e12 / roof.matmul_flops_s
    return row


def run(
    cases: list[gpu_cases.Case], timer: Timer, roof: Roof, dtype: torch.dtype, *, budget_s: float
) -> tuple[list[gpu_rows.Row], dict[str, str], int]:
    """Rows, what failed while it was measured, and how many cases were left out for lack of time."""
    progress, end_s = Progress(len(cases)), time.monotonic() + budget_s
    rows: list[gpu_rows.Row] = []
    broken: dict[str, str] = {}
    left_out = 0
    for case in cases:
        if case.op in broken:
            continue
        if time.monotonic() > end_s:
            left_out += 1
            continue
        progress.step(f"{case.op}, {case.config}")
        try:
            rows.append(measure(case, timer, roof, dtype))
        except torch.cuda.OutOfMemoryError as error:
            print(f"{case.op}, {case.config}: left out: {str(error).splitlines()[0]}")
        except Exception as error:
            broken[case.op] = f"{case.config}: {type(error).__name__}: {str(error).splitlines()[0]}"
            rows = [row for row in rows if row["op"] != case.op]
    progress.end()
    return rows, broken, left_out


@torch.inference_mode()
def main(arguments: list[str] | None = None) -> int:
    """Prints the table; returns 1 where a kernel is wrong."""
    parser = argparse.ArgumentParser(prog="bench/kernels.py", description=__doc__)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--budget-s", type=float, default=100.0)
    parser.add_argument("--only", default="", help="ops, separated by commas")
    parser.add_argument("--failed", default="", help="ops whose tests failed: no speed is shown of them")
    parser.add_argument("--small", action="store_true", help="the shapes of tests, also on a GPU")
    parser.add_argument("--csv", type=Path, help=f"append rows here; on a GPU, {CSV.name} without being told")
    options = parser.parse_args(arguments)
    begin_s = time.monotonic()
    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    machine: Machine = describe(device)
    shapes = gpu_cases.SMALL if options.small or device.type == "cpu" else gpu_cases.FULL
    cases = list(gpu_cases.cases(shapes, dtype, device))
    if options.only:
        wanted = set(options.only.split(","))
        if unknown := wanted - {case.op for case in cases}:
            parser.error(f"no cases of {', '.join(sorted(unknown))}")
        cases = [case for case in cases if case.op in wanted]
    problems = check_kernels(dict.fromkeys(case.op for case in cases), device, filter(None, options.failed.split(",")))
    cases = [case for case in cases if case.op not in problems]
    timer = Timer(device, budget_s=0.02 if shapes is gpu_cases.SMALL else 0.2)
    roof = measure_roof(timer, device)
    rows, broken, left_out = run(cases, timer, roof, dtype, budget_s=options.budget_s - (time.monotonic() - begin_s))
    problems |= broken
    csv = options.csv or (CSV if device.type == "cuda" and not options.small else None)
    if csv is not None:
        gpu_rows.append(csv, machine, COLUMNS, rows)
    print(
        f"{machine.gpu}, driver {machine.driver}, torch {machine.torch}, Triton {machine.triton}, {machine.revision}:"
        f" copy {roof.copy_bytes_s / 1e9:.0f} GB/s, matmul {roof.matmul_flops_s / 1e12:.0f} TFLOP/s"
    )
    print(gpu_rows.table(SHOWN, rows))
    if left_out:
        print(f"{left_out} cases left out: the budget of {options.budget_s:g} s was over")
    for op, problem in problems.items():
        print(f"NO SPEED of {op}: {problem}")
    return 1 if problems else 0
