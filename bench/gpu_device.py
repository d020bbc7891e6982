"""The device that a GPU benchmark runs on: what it is, how work on it is timed, and how fast it is at most.

Times on CUDA are those between two events around the call. Before the first event the device is kept busy for longer
than the host needs to enqueue the call, so that no gap of the host's is in them, and the L2 cache is written over, so
that inputs come from memory. On the CPU, for tests, times are the host's.
"""

from __future__ import annotations

import importlib.metadata
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import torch

__all__ = ["Machine", "Roof", "Timer", "Timing", "describe", "measure_roof", "resolve_device"]

_ROOT = Path(__file__).parent.parent
# Written over between repetitions: several times the largest L2 (60 MB on an H200).
_FLUSH_BYTES = 256 << 20
_CYCLES_PER_S = 2e9
_LONGEST_SLEEP_S = 0.02
_MAX_REPEAT = 30


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What a figure depends on; the first columns of every row."""

    date: str
    gpu: str
    driver: str
    torch: str
    triton: str
    revision: str


@dataclass(frozen=True, slots=True)
class Roof:
    """What this device reaches at most, measured: bytes read plus written, and bf16 operations, per second."""

    copy_bytes_s: float
    matmul_flops_s: float


@dataclass(frozen=True, slots=True)
class Timing:
    """Medians of one call: on the device, and what the host took to enqueue it."""

    device_s: float
    host_s: float
    repeats: int


def resolve_device(name: str) -> torch.device:
    """ "auto" is CUDA where there is one."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else torch.device(name)


def describe(device: torch.device) -> Machine:
    """The machine of this moment."""
    is_cuda = device.type == "cuda"
    return Machine(
        date=datetime.now(UTC).isoformat(timespec="seconds"),
        gpu=torch.cuda.get_device_name(device) if is_cuda else "cpu",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if is_cuda else "",
        torch=torch.__version__,
        triton=_version("triton"),
        revision=_revision(),
    )


class Timer:
    """Times calls on `device`.

    Args:
        budget_s: of device time for one call's repetitions; a call is repeated at least three times.
    """

    def __init__(self, device: torch.device, *, budget_s: float = 0.2) -> None:
        self._device = device
        self._budget_s = budget_s
        is_cuda = device.type == "cuda"
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=device) if is_cuda else None

    def time(self, call: Callable[[], object]) -> Timing:
        """Medians of `call`, which is warmed up first (compiled, its handles made)."""
        for _ in range(2):
            call()
        return self._time_cuda(call) if self._flush is not None else self._time_host(call)

    def _time_host(self, call: Callable[[], object]) -> Timing:
        times: list[float] = []
        while len(times) < 3 or (sum(times) < self._budget_s and len(times) < _MAX_REPEAT):
            begin_s = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin_s)
        median_s = statistics.median(times)
        return Timing(median_s, median_s, len(times))

    def _time_cuda(self, call: Callable[[], object]) -> Timing:
        assert self._flush is not None
        torch.cuda.synchronize(self._device)
        begin_s = time.perf_counter()
        call()
        enqueue_s = time.perf_counter() - begin_s
        torch.cuda.synchronize(self._device)
        whole_s = time.perf_counter() - begin_s
        repeats = max(3, min(_MAX_REPEAT, int(self._budget_s / max(whole_s, 1e-5))))
        # A host that is interrupted must not leave the device idle between the events.
        sleep_cycles = int(min(_LONGEST_SLEEP_S, 3 * enqueue_s + 1e-4) * _CYCLES_PER_S)
        host: list[float] = []
        events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
        for begin, end in events:
            torch.cuda._sleep(sleep_cycles)
            self._flush.zero_()
            begin.record()
            begin_s = time.perf_counter()
            call()
            host.append(time.perf_counter() - begin_s)
            end.record()
        torch.cuda.synchronize(self._device)
        device_s = statistics.median(begin.elapsed_time(end) for begin, end in events) / 1e3
        return Timing(device_s, statistics.median(host), repeats)


def measure_roof(timer: Timer, device: torch.device) -> Roof:
    """Copies a large buffer on the device, and multiplies large bf16 matrices of random numbers."""
    is_cuda = device.type == "cuda"
    num_bytes, size = (2 << 30, 8192) if is_cuda else (32 << 20, 256)

    def copy() -> Timing:
        source = torch.empty(num_bytes, dtype=torch.uint8, device=device)
        source.view(torch.int64).random_()
        target = torch.empty_like(source)
        return timer.time(lambda: target.copy_(source))

    copied = copy()  # whose buffers are free again
    a = torch.randn((size, size), dtype=torch.bfloat16, device=device)
    b = torch.randn((size, size), dtype=torch.bfloat16, device=device)
    multiplied = timer.time(lambda: torch.mm(a, b))
    return Roof(2 * num_bytes / copied.device_s, 2 * size**3 / multiplied.device_s)


def _revision() -> str:
    """The commit, with a plus sign where files differ from it; BATON_REVISION where there is no repository."""
    commit = _output("git", "-C", str(_ROOT), "rev-parse", "--short=12", "HEAD")
    if not commit:
        return os.environ.get("BATON_REVISION", "unknown")
    # The tables that benchmarks append to are no change of what is measured.
    changed = _output("git", "-C", str(_ROOT), "status", "--porcelain", "-uno", "--", ":!docs/benchmarks")
    return commit + ("+" if changed else "")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def _output(*command: str) -> str:
    """First line of what a command says; empty where it cannot."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip().splitlines()[0] if done.returncode == 0 and done.stdout.strip() else ""
