"""A long run under load with one fault after another: nothing lost, nothing wrong, nothing that grows.

Usage: make soak, or: python bench/soak.py [--minutes 20] [--every-s 10] [--load 0.7] [--seed 1] [--set key=value ...]

Starts `baton up` (launcher local, the model that ships, two workers of each kind), measures how many requests a second
it serves, and then sends `--load` of that, as they come (Poisson), while every `--every-s` seconds a fault is drawn
from all kinds that `baton chaos --list` describes and this cluster allows; the same seed draws the same ones. Prints a
row now and then, and in the end what failed, what was wrong, how memory and descriptors grew (least squares over
the later half of each process that lived long enough, and over those of a role together), and the KV blocks that are
still owned. Exit code 1 when a promise broke or a bound was passed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton.cluster.chaos.growth import SETTLED_S, Bounds, by_role, excesses, growths
from baton.cluster.chaos.report import Report, percentile
from baton.cluster.chaos.report_text import render
from baton.cluster.chaos.run import SETTLE_S, ChaosRun
from baton.cluster.chaos.scenarios import SCENARIOS, Scenario, drawn_strikes
from baton.errors import BatonError
from own_cluster import Cluster, settings

_CAPACITY_CLIENTS = 8
_CAPACITY_S = 8.0
_AT_ONCE = 48
_MOST_ROWS = 40
_HEAD = "   at s  requests  failed  wrong  refused  resumed  running  wait p99 ms   RSS MiB  descriptors  last fault"


async def run(cluster: Cluster, arguments: argparse.Namespace) -> list[str]:
    """What broke, in words."""
    async with ChaosRun(cluster.run_state) as chaos:
        scenarios = await allowed(chaos)
        print("faults:", ", ".join(scenario.name for scenario in scenarios))
        await chaos.load.expect()
        capacity_per_s = await capacity(chaos)
        rate_per_s = arguments.load * capacity_per_s
        print(f"serves {capacity_per_s:.1f} requests/s; sending {rate_per_s:.1f} requests/s, seed {arguments.seed}")
        duration_s = 60.0 * arguments.minutes
        strikes = list(drawn_strikes(scenarios, duration_s=duration_s, every_s=arguments.every_s, seed=arguments.seed))
        chaos.begin()
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(chaos.load.arrivals(rate_per_s, stop, seed=arguments.seed, at_once=_AT_ONCE))
            striking = tasks.create_task(chaos.striker.run(strikes))
            telling = asyncio.create_task(tell(chaos, max(5.0, duration_s / _MOST_ROWS)))
            try:
                await asyncio.sleep(duration_s)
                await striking
            finally:
                telling.cancel()
                stop.set()
        await chaos.recover()
        owned, settle_s = await chaos.settle(SETTLE_S)
        await chaos.recover()  # told of is what the last look has seen, and that may have been in vain
        facts = chaos.facts("soak", duration_s=duration_s, clients=0, owned=owned, settle_s=settle_s)
        if chaos.load.held_back:
            print(f"{chaos.load.held_back} requests were not sent: {_AT_ONCE} were under way")
        if arguments.keep:
            keep_samples(chaos, arguments.keep / "samples.json")
        report = Report.of(facts)
        # A request that waits holds its client's socket.
        return show(chaos, report, Bounds(descriptors=16.0 + _AT_ONCE))


async def allowed(chaos: ChaosRun) -> list[Scenario]:
    """The scenarios that can be done to this cluster."""
    found = []
    for scenario in SCENARIOS.values():
        try:
            await chaos.check(scenario)
        except BatonError as error:
            print(f"without {scenario.name}: {error}")
        else:
            found.append(scenario)
    return found


async def capacity(chaos: ChaosRun) -> float:
    """Requests a second with nobody disturbed and always enough to do."""
    chaos.load.begin()
    stop = asyncio.Event()
    async with asyncio.TaskGroup() as tasks:
        for number in range(_CAPACITY_CLIENTS):
            tasks.create_task(chaos.load.client(number, stop))
        await asyncio.sleep(_CAPACITY_S)
        done = len(chaos.load.outcomes)
        stop.set()
    chaos.load.outcomes.clear()
    return done / _CAPACITY_S


async def tell(chaos: ChaosRun, every_s: float) -> None:
    """A row now and then, until cancelled."""
    print(_HEAD)
    begin = 0
    while True:
        await asyncio.sleep(every_s)
        outcomes = chaos.load.outcomes
        waits_s = [outcome.longest_wait_s for outcome in outcomes[begin:]]
        begin = len(outcomes)
        newest = [samples[-1] for samples in chaos.observer.samples.values() if samples]
        current = [sample for sample in newest if sample.at_s > chaos.load.now_s() - 3.0]
        strikes = chaos.striker.records
        last = f"{strikes[-1].scenario} {strikes[-1].instance_id}" if strikes else ""
        print(
            f"{chaos.load.now_s():7.0f}{len(outcomes):10}{sum(bool(each.error) for each in outcomes):8}"
            f"{sum(each.is_wrong for each in outcomes):7}{sum(each.refusals > 0 for each in outcomes):9}"
            f"{chaos.observer.resumes:9}{chaos.load.running:9}{1000 * percentile(waits_s, 0.99):13.0f}"
            f"{sum(sample.resident_bytes for sample in current) / 2**20:10.0f}"
            f"{sum(sample.descriptors for sample in current):13}  {last}",
            flush=True,
        )


def keep_samples(chaos: ChaosRun, path: Path) -> None:
    """Every look at every process, to be looked at again."""
    looks = [
        {"name": name, "pid": pid, "looks": [[each.at_s, each.resident_bytes, each.descriptors] for each in taken]}
        for (name, pid), taken in sorted(chaos.observer.samples.items())
    ]
    path.write_text(json.dumps(looks))


def show(chaos: ChaosRun, report: Report, bounds: Bounds) -> list[str]:
    """Prints the end; what broke."""
    grown = growths(chaos.observer.samples)
    table = Table(title="each process after its warm-up; what it grew in the later half of that")
    head = ("process", "pid", "s", "RSS MiB", "MiB/min", "grown MiB", "descriptors", "at most", "grown")
    for column in head:
        table.add_column(column, justify="left" if column == "process" else "right")
    for each in grown:
        table.add_row(
            each.name,
            str(each.pid),
            f"{each.span_s:.0f}",
            f"{each.first_bytes / 2**20:.0f} to {each.last_bytes / 2**20:.0f}",
            f"{each.slope_bytes_per_min / 2**20:.2f}",
            f"{each.grown_bytes / 2**20:.1f}",
            f"{each.first_descriptors} to {each.last_descriptors}",
            str(each.max_descriptors),
            f"{each.grown_descriptors:.1f}",
        )
    roles = Table(title="all lives of a role together, settled or in their later halves")
    for column in ("role", "lives", "looked at", "s", "MiB/min", "descriptors/min"):
        roles.add_column(column, justify="left" if column == "role" else "right")
    for role in by_role(grown):
        roles.add_row(
            role.role,
            str(role.lives),
            f"after {SETTLED_S:.0f} s" if role.is_settled else "later halves",
            f"{role.looked_s:.0f}",
            f"{role.slope_bytes_per_min / 2**20:.2f} ± {role.doubt_bytes_per_min / 2**20:.2f}",
            f"{role.descriptor_slope_per_min:.2f} ± {role.doubt_descriptors_per_min:.2f}",
        )
    console = Console(width=150)
    for part in (render(report), table, roles):
        console.print(part)
    beyond = excesses(grown, bounds)
    for text in beyond:
        print("BROKEN:", text)
    return [*report.broken, *beyond]


def main(arguments: Sequence[str] | None = None) -> int:
    """Exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--every-s", type=float, default=10.0, help="from one fault to the next")
    parser.add_argument("--load", type=float, default=0.7, help="part of the capacity")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="a folder for the cluster's files, logs among them")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parsed = parser.parse_args(arguments)
    options = settings(
        "name=soak",
        "router.http=127.0.0.1:0",
        "router.grpc=127.0.0.1:0",
        "prefill.replicas=2",
        "decode.replicas=2",
        "kv.memory=16MiB",
        "transfer.arena=4MiB",
        "faults.allow_at_runtime=true",
        "router.replicas=2",
        # Kept answers must not look like a leak.
        "router.idempotency_ttl_s=20",
        # Nor may what `baton explain` can tell, while it fills: no router lives long enough for a thousand.
        "router.kept_requests=128",
        # Every prompt takes the way on which the most can be lost, and the links of all pairs are up from the first.
        "routing.disaggregate=always",
        *parsed.set,
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = parsed.keep or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        return soak(folder, options, parsed)


def soak(folder: Path, options: list[str], parsed: argparse.Namespace) -> int:
    """Exit code of a run whose cluster has its files in `folder`."""
    with Cluster(folder, ["--launcher", "local", *options]) as cluster:
        cluster.use_its_runs()
        cluster.wait_ready()
        broken = asyncio.run(run(cluster, parsed))
        if broken:
            print(cluster.log())
    return int(bool(broken))


if __name__ == "__main__":
    sys.exit(main())
