"""The command.

    python -m tests.simulation 4711 --trace            one seed, every event
    python -m tests.simulation --seeds 2000            seeds 0 to 1999; or --seeds 500:600
    make simulate ARGS="--seeds 100000 --jobs 8"       as a nightly run

Prints every seed that breaks a promise, with the promise, the scenario and the last events, and ends with 1 if there
was one. The same seed does the same each time, in every process: the order of sets of names, which would else differ,
is fixed by starting anew with PYTHONHASHSEED=0.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field

__all__ = ["Summary", "main", "run_seeds"]

_CHUNK = 64


@dataclass(slots=True)
class Summary:
    """What came of some seeds.

    Attributes:
        broken: by seed, what to print.
        ends: how requests ended.
        touched: what the product's metrics counted.
    """

    num_seeds: int = 0
    num_events: int = 0
    num_steps: int = 0
    virtual_s: float = 0.0
    cpu_s: float = 0.0
    broken: dict[int, str] = field(default_factory=dict)
    ends: Counter[str] = field(default_factory=Counter)
    touched: Counter[str] = field(default_factory=Counter)

    def add(self, other: Summary) -> None:
        """Those of other seeds too."""
        self.num_seeds += other.num_seeds
        self.num_events += other.num_events
        self.num_steps += other.num_steps
        self.virtual_s += other.virtual_s
        self.cpu_s += other.cpu_s
        self.broken |= other.broken
        self.ends += other.ends
        self.touched += other.touched

    def __str__(self) -> str:
        num = max(1, self.num_seeds)
        ends = ", ".join(f"{name} {count}" for name, count in self.ends.most_common())
        touched = ", ".join(f"{name} {count:g}" for name, count in sorted(self.touched.items()))
        return (
            f"{self.num_seeds} seeds, {len(self.broken)} broken; {self.cpu_s:.1f} s of CPU,"
            f" {self.cpu_s / num * 1e3:.0f} ms each; {self.virtual_s / num:.1f} virtual seconds,"
            f" {self.num_events / num:.0f} events, {self.num_steps / num:.0f} engine steps each\n"
            f"requests ended: {ends}\ntouched: {touched}"
        )


def run_seeds(first: int, end: int, *, trace: bool = False) -> Summary:
    """Runs seeds [first, end) in this process."""
    import torch
    from tests.simulation.run import forget_runs, run_seed
    from tests.simulation.stand_ins import counted

    torch.set_num_threads(1)
    gc.disable()
    gc.freeze()
    summary = Summary(num_seeds=end - first)
    before, begun_s = Counter(counted()), time.process_time()
    for seed in range(first, end):
        outcome = run_seed(seed, trace=trace)
        summary.num_events += outcome.num_events
        summary.num_steps += outcome.num_steps
        summary.virtual_s += outcome.virtual_s
        summary.ends.update(outcome.ends)
        if trace:
            print(f"{outcome.scenario}\n{outcome.transcript}")
        if outcome.violation is not None:
            last = "" if trace else f"{outcome.scenario}\n{outcome.transcript}\n"
            summary.broken[seed] = (
                f"{last}seed {seed} breaks a promise: {outcome.violation}\n"
                f"see it again: python -m tests.simulation {seed} --trace\n"
            )
    summary.cpu_s = time.process_time() - begun_s
    summary.touched = Counter(counted()) - before
    forget_runs()
    return summary


def main() -> None:
    """Runs what the command line asks for; ends with 1 where a promise was broken."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="python -m tests.simulation", description="Runs simulated clusters.")
    parser.add_argument("seed", type=int, nargs="?", help="one seed")
    parser.add_argument("--seeds", default="200", help="how many, or FIRST:END")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--stop-after", type=int, default=10, help="end after so many broken seeds")
    options = parser.parse_args()
    if options.seed is not None:
        first, end = options.seed, options.seed + 1
    else:
        first, end = map(int, options.seeds.split(":")) if ":" in options.seeds else (0, int(options.seeds))
    chunks = [(begin, min(begin + _CHUNK, end), options.trace) for begin in range(first, end, _CHUNK)]
    summary = Summary()
    begun_s = time.monotonic()
    for part in _run_all(chunks, options.jobs):
        for text in part.broken.values():
            _clear()
            print(text)
        summary.add(part)
        _show_progress(summary, end - first, time.monotonic() - begun_s)
        if len(summary.broken) >= options.stop_after:
            break
    _clear()
    print(summary)
    sys.exit(bool(summary.broken))


def _run_all(chunks: list[tuple[int, int, bool]], jobs: int) -> Iterator[Summary]:
    if jobs == 1 or len(chunks) == 1:
        yield from map(_run_chunk, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(jobs) as pool:
        yield from pool.imap_unordered(_run_chunk, chunks)


def _run_chunk(chunk: tuple[int, int, bool]) -> Summary:
    first, end, trace = chunk
    return run_seeds(first, end, trace=trace)


def _show_progress(summary: Summary, num_all: int, took_s: float) -> None:
    if not sys.stderr.isatty():
        return
    done = summary.num_seeds
    width = 30 * done // num_all
    left_s = took_s / done * (num_all - done)
    print(
        f"\r[{'#' * width}{'.' * (30 - width)}] {done}/{num_all} seeds, {len(summary.broken)} broken,"
        f" {done / took_s:.0f}/s, {left_s:.0f} s left ",
        end="",
        file=sys.stderr,
        flush=True,
    )


def _clear() -> None:
    if sys.stderr.isatty():
        print("\r\x1b[K", end="", file=sys.stderr, flush=True)
