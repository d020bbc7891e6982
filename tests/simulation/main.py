"""The command: `python -m tests.simulation SEED --trace` runs one, `--seeds 0:2000` many.

Prints every seed that breaks a promise, with the promise and the last events. The same seed does the same each time:
the order of sets of names is fixed by starting anew with PYTHONHASHSEED=0.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time


def main() -> None:
    """Runs what the command line asks for; ends with 1 where a promise was broken."""
    if os.environ.get("PYTHONHASHSEED") != "0":
        os.environ["PYTHONHASHSEED"] = "0"
        os.execv(sys.executable, [sys.executable, "-m", "tests.simulation", *sys.argv[1:]])
    parser = argparse.ArgumentParser(prog="python -m tests.simulation")
    parser.add_argument("seed", type=int, nargs="?")
    parser.add_argument("--seeds", help="FIRST:END")
    parser.add_argument("--trace", action="store_true", help="print every event")
    parser.add_argument("--keep-going", type=int, default=1, help="end after so many broken seeds")
    options = parser.parse_args()
    import torch

    from tests.simulation.run import forget_runs, run_seed
    from tests.simulation.stand_ins import counted

    torch.set_num_threads(1)
    gc.freeze()
    first, end = (options.seed, options.seed + 1) if options.seeds is None else map(int, options.seeds.split(":"))
    begun_s = time.process_time()
    broken, ends, events, steps, virtual_s = 0, {}, 0, 0, 0.0
    for seed in range(first, end):
        outcome = run_seed(seed, trace=options.trace)
        events, steps, virtual_s = events + outcome.num_events, steps + outcome.num_steps, virtual_s + outcome.virtual_s
        for how, count in outcome.ends.items():
            ends[how] = ends.get(how, 0) + count
        if outcome.violation is not None or options.trace:
            print(outcome.scenario)
            print(outcome.transcript)
        if outcome.violation is not None:
            print(f"seed {seed} breaks a promise: {outcome.violation}\nagain: python -m tests.simulation {seed} --trace\n")
            broken += 1
            if broken >= options.keep_going:
                break
    took_s = time.process_time() - begun_s
    num = seed - first + 1
    print(
        f"{num} seeds in {took_s:.1f} s ({took_s / num * 1e3:.1f} ms each), {broken} broken; {virtual_s / num:.1f} virtual"
        f" seconds, {events / num:.0f} events, {steps / num:.0f} engine steps each; ends: {ends}"
    )
    print("touched: " + ", ".join(f"{name.removeprefix('baton_')} {value:g}" for name, value in counted().items()))
    forget_runs()
    sys.exit(broken > 0)
