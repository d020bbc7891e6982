"""All that a machine with one GPU can say about Baton, in one command: is it right, and how fast is it.

    python bench/gpu_check.py [--wheels DIR] [--device cuda] [--budget-s 470] [--only tests,kernels] [--small]

Stages, each a process of its own with its part of the time; one that fails, hangs or lacks a package does not hide the
others. Logs lie in build/gpu-check/.

    1  tests     kernels against their references, and whatever other tests look for a GPU
    2  exact     greedy tokens against transformers on the device; disaggregated on one GPU against local
    4  cluster   the same through a served cluster: launcher local, cuda_ipc
    8  kernels   bench/kernels.py: GB/s and TFLOP/s as shares of the measured roof
    16 engine    bench/engine.py: decode steps, prefills, handovers, transformers, vLLM

The exit status is the sum of the numbers of the stages that failed; 64: the machine lacks what every stage needs. A
kernel whose tests failed gets no speed. Nothing is installed and nothing is fetched; --wheels unpacks wheels that were
carried here for what is missing. Rows are appended to docs/benchmarks/*.csv, and a short table is printed last.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import gpu_packages
import gpu_rows

ROOT = Path(__file__).parent.parent
BENCH = ROOT / "bench"
OUT = ROOT / "build" / "gpu-check"
LACKING = 64
_TICK_S = 0.2
_TELL_EVERY_S = 15.0
_INTERRUPT_S = 5.0
# What a test's name says about the kernel that it is of.
KERNEL_WORDS = {
    "paged_attention": ("attention",),
    "rms_norm": ("norm",),
    "silu_mul": ("silu", "activation"),
    "rope_and_cache": ("rope", "rotary"),
    "qk_norm_rope_and_cache": ("rope", "rotary", "qk_norm"),
    "gather_pages": ("pages", "gather"),
    "gather_pages_summed": ("pages", "gather", "checksum"),
    "scatter_pages": ("pages", "scatter"),
    "scatter_pages_summed": ("pages", "scatter", "checksum"),
    "block_copy": ("pages", "block_copy", "copy"),
    "checksum": ("checksum",),
    "logits_lse": ("logits", "lse"),
    "draw_tokens": ("sampl", "draw", "gumbel", "noise"),
}


@dataclass(slots=True)
class Stage:
    """One stage.

    Attributes:
        bit: in the exit status.
        limit_s: after which it is ended, with all that it started; later where stages before it took less.
        budget_margin_s: it is told, by --budget-s, to use so much less than that; None: it cannot be told.
        needs: modules without which it is left out, which counts as failed.
        failure: why it failed; None before it has run, empty where it has not failed.
        said: last lines of its output.
    """

    name: str
    bit: int
    limit_s: float
    command: list[str]
    needs: Sequence[str] = ()
    budget_margin_s: float | None = None
    failure: str | None = None
    taken_s: float = 0.0
    said: list[str] = field(default_factory=list)


def stages(device: str, *, small: bool) -> list[Stage]:
    """Every stage, in order. Limits add up to eight minutes less what starting costs; see `allowance_s`."""
    python = sys.executable
    own = ["--device", device, *(["--small"] if small else [])]
    few = ["--prompts", "3", "--tokens", "4"] if small else []
    return [
        Stage("tests", 1, 110.0, [python, "-m", "pytest", *_test_arguments()], ("pytest",)),
        Stage(
            "exact", 2, 70.0, [python, str(BENCH / "gpu_exact.py"), "--device", device, *few], ("transformers", "grpc")
        ),
        Stage(
            "cluster",
            4,
            45.0,
            [python, str(BENCH / "gpu_cluster.py"), "--device", device.partition(":")[0], *few],
            tuple(gpu_packages.SERVING),
        ),
        Stage("kernels", 8, 95.0, [python, str(BENCH / "kernels.py"), *own], budget_margin_s=15.0),
        Stage("engine", 16, 145.0, [python, str(BENCH / "engine.py"), *own], budget_margin_s=5.0),
    ]


def device_tests() -> list[Path]:
    """Test files that look for a GPU, or for Triton, and run on what they find; compiling needs no GPU."""
    rooms = [ROOT / "tests" / room for room in ("kernels", "engine", "kv_transfer")]
    files = [path for room in rooms for path in room.glob("test_*.py") if "compile" not in path.stem]
    words = ("cuda.is_available", "cuda.device_count", "triton")
    return sorted(path for path in files if any(word in path.read_text(encoding="utf-8") for word in words))


def allowance_s(wanted: Sequence[Stage], at: int, left_s: float) -> float:
    """How long stage `at` may take: all that is left but what later stages are sure of."""
    return left_s - sum(stage.limit_s for stage in wanted[at + 1 :])


def _test_arguments() -> list[str]:
    """What pytest runs."""
    workers = ["-n", "8", "--dist", "worksteal"] if importlib.util.find_spec("xdist") else []
    report = ["--junit-xml", str(OUT / "tests.xml"), "-o", "addopts=", "-q", "--tb=short", "-p", "no:cacheprovider"]
    return [*(str(path.relative_to(ROOT)) for path in device_tests()), *workers, *report]


def failed_kernels(report: Path, kernels: Iterable[str] = KERNEL_WORDS) -> list[str]:
    """Kernels whose tests failed, by a JUnit report; all where there is none, or a test of kernels names none."""
    names = list(kernels)
    try:
        cases = list(ElementTree.parse(report).getroot().iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return names
    if not cases:
        return names
    failed: set[str] = set()
    for case in cases:
        if case.find("failure") is None and case.find("error") is None:
            continue
        test = f"{case.get('classname', '')} {case.get('name', '')}".lower()
        if "tests.kernels." not in test and case.get("classname"):
            continue
        hit = {name for name in names if any(word in test for word in KERNEL_WORDS[name])}
        failed |= hit or set(names)
    return [name for name in names if name in failed]


def run(stage: Stage, limit_s: float, environment: dict[str, str], index: str) -> None:
    """Runs a stage until it ends or its time is over, and notes how."""
    if lacking := gpu_packages.missing(stage.needs):
        packages = [gpu_packages.SERVING.get(name, name) for name in lacking]
        stage.failure = (
            f"not run: {', '.join(packages)} missing here; carry wheels and give --wheels (make: WHEELS=dir)"
        )
        return
    if limit_s < 5.0:
        stage.failure = "not run: no time was left"
        return
    log_path = OUT / f"{stage.name}.log"
    begin_s = told_s = time.monotonic()
    terminal = sys.stderr.isatty()
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None and (now_s := time.monotonic()) - begin_s < limit_s:
                if terminal or now_s - told_s >= _TELL_EVERY_S:
                    told_s = now_s
                    text = f"[{index}] {stage.name}: {now_s - begin_s:.0f} of {limit_s:.0f} s  {_last_line(log_path)}"
                    print(f"\r\x1b[2K{text[:110]}" if terminal else text, end="" if terminal else "\n", file=sys.stderr)
                    sys.stderr.flush()
                time.sleep(_TICK_S)
        finally:
            hangs = process.poll() is None
            if hangs:
                # Tests that have run are reported, where pytest is given the moment.
                process.send_signal(signal.SIGINT)
                with suppress(subprocess.TimeoutExpired):
                    process.wait(_INTERRUPT_S)
            # The whole group: what the stage started must not hold the GPU's memory.
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait(_INTERRUPT_S)
    if terminal:
        print("\r\x1b[2K", end="", file=sys.stderr)
    stage.taken_s = time.monotonic() - begin_s
    stage.said = [line for line in _text(log_path).splitlines() if line.strip()]
    if hangs:
        stage.failure = f"ended after {limit_s:.0f} s: its time was over ({_last_line(log_path)})"
    elif process.returncode:
        stage.failure = f"code {process.returncode}: {_last_line(log_path)}"
    else:
        stage.failure = ""


def _text(path: Path) -> str:
    return path.read_text(errors="replace").replace("\r", "\n")


def _last_line(path: Path) -> str:
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 2000))
        lines = file.read().decode(errors="replace").replace("\r", "\n").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


def environment(site: Path | None) -> dict[str, str]:
    """For every stage: the checkout, its benchmarks and carried packages on the path, Triton on the device itself."""
    paths = [str(ROOT / "src"), str(BENCH), *([] if site is None else [str(site)])]
    if before := os.environ.get("PYTHONPATH"):
        paths.append(before)
    own = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
    own.pop("TRITON_INTERPRET", None)
    own.setdefault("TOKENIZERS_PARALLELISM", "false")
    return own


def telling(rows: Sequence[dict[str, str]]) -> list[dict[str, str]]:
    """The rows of kernels that aims speak of: attention over 4 K and more, of all others the largest case."""

    def is_aim(row: dict[str, str]) -> bool:
        return row["config"].startswith("prefill") or any(f"context {n}" in row["config"] for n in (4096, 131072))

    attention = [row for row in rows if row["op"] == "paged_attention" and is_aim(row)]
    largest: dict[str, dict[str, str]] = {}
    for row in rows:
        if row["op"] != "paged_attention" and float(row["us"]) >= float(largest.get(row["op"], row)["us"]):
            largest[row["op"]] = row
    return [*attention, *largest.values()]


def summary(done: Sequence[Stage], started: str) -> str:
    """What is printed last: the most telling rows, then the stages."""
    parts = []
    kernels = gpu_rows.latest(ROOT / "docs" / "benchmarks" / "gpu_kernels.csv", started)
    engine = gpu_rows.latest(ROOT / "docs" / "benchmarks" / "gpu_engine.csv", started)
    if kernels:
        parts.append(
            gpu_rows.table(("op", "config", "us", "gb_s", "copy_share", "tflop_s", "matmul_share"), telling(kernels))
        )
    if engine:
        columns = ("kind", "batch", "context", "step_ms", "host_ms", "of_floor", "matmul_share", "payload_mib", "gb_s")
        parts.append(gpu_rows.table((*columns, "copy_share", "note"), engine))
    exact = next((stage for stage in done if stage.name == "exact"), None)
    if exact is not None and exact.said:
        parts.append("\n".join(line for line in exact.said[-16:] if not line.startswith("[")))
    rows: list[gpu_rows.Row] = [
        {
            "stage": stage.name,
            "seconds": f"{stage.taken_s:.0f}",
            "result": "ok" if not stage.failure else f"FAILED: {stage.failure}",
        }
        for stage in done
    ]
    parts.append(gpu_rows.table(("stage", "seconds", "result"), rows))
    return "\n\n".join(parts)


def main(arguments: list[str] | None = None) -> int:
    """Runs the stages; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, help="folder of wheels for what is missing here")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--budget-s", type=float, default=470.0)
    parser.add_argument("--only", default="", help="stages, separated by commas")
    parser.add_argument("--small", action="store_true", help="tiny shapes and few tokens, to try the command out")
    options = parser.parse_args(arguments)
    begin_s, started = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    OUT.mkdir(parents=True, exist_ok=True)
    site = None
    if options.wheels is not None:
        try:
            site = gpu_packages.install_wheels(options.wheels, OUT / "site")
        except ValueError as error:
            print(error, file=sys.stderr)
            return LACKING
        sys.path.append(str(site))
    if problem := why_not(options.device):
        print(f"gpu-check cannot run: {problem}", file=sys.stderr)
        return LACKING
    wanted = stages(options.device, small=options.small)
    if options.only:
        names = options.only.split(",")
        if unknown := set(names) - {stage.name for stage in wanted}:
            parser.error(f"no such stage: {', '.join(sorted(unknown))}")
        wanted = [stage for stage in wanted if stage.name in names]
    (OUT / "tests.xml").unlink(missing_ok=True)
    own = environment(site)
    # Without some of the stages, the others need no more time than with them.
    end_s = begin_s + min(options.budget_s, sum(stage.limit_s for stage in wanted) + 5.0)
    for at, stage in enumerate(wanted):
        if stage.name == "kernels" and any(other.name == "tests" for other in wanted):
            stage.command += ["--failed", ",".join(failed_kernels(OUT / "tests.xml"))]
        limit_s = allowance_s(wanted, at, end_s - time.monotonic())
        if stage.budget_margin_s is not None:
            stage.command += ["--budget-s", f"{limit_s - stage.budget_margin_s:.0f}"]
        run(stage, limit_s, own, f"{at + 1}/{len(wanted)}")
        result = "ok" if not stage.failure else f"FAILED: {stage.failure}"
        print(f"{stage.name}: {result} ({stage.taken_s:.0f} s, {OUT / stage.name}.log)", flush=True)
    print()
    print(summary(wanted, started))
    return sum(stage.bit for stage in wanted if stage.failure)


def why_not(device: str) -> str:
    """Why no stage can run here; empty where they can."""
    if lacking := gpu_packages.missing(gpu_packages.ENGINE):
        return (
            f"{sys.executable} has no {', '.join(lacking)}; say `make gpu-check PYTHON=...` with the Python that has"
            " torch, or carry wheels and say WHEELS=dir"
        )
    if device.startswith("cuda"):
        import torch

        if not torch.cuda.is_available():
            return f"torch {torch.__version__} sees no GPU"
    return ""


if __name__ == "__main__":
    raise SystemExit(main())
