"""What clients feel while workers are killed under load: failed requests, wrong tokens, and how long streams stall.

Usage: python bench/worker_loss.py [--role decode|prefill|router] [--clients 8] [--requests 100] [--every-s 5]
                                   [--launcher local] [--set key=value ...] [--json FILE]

Starts `baton up` with the model that ships and two instances of the role, asks once for each prompt with nobody
disturbed, then has `--clients` clients stream `--requests` requests each while an instance is killed (SIGKILL) every
`--every-s` seconds, in turn; a kill waits, a moment, while only one instance is there. Half of the requests are
sampled. Prints what failed, what was wrong, what was resumed, the longest waits of streams, and the KV blocks that are
still owned afterwards; exit code 1 when a promise broke. A few minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from baton.cluster.chaos.report import Report
from baton.cluster.chaos.report_text import render
from baton.cluster.chaos.run import SETTLE_S, ChaosRun
from baton.cluster.chaos.scenarios import Scenario, Strike, find
from own_cluster import Cluster, settings


async def run(cluster: Cluster, arguments: argparse.Namespace) -> Report:
    """Load and kills side by side; the load decides when it is over."""
    scenario = replace(find(f"kill-{arguments.role}"), every_s=arguments.every_s)
    async with ChaosRun(cluster.run_state) as chaos:
        await chaos.check(scenario)
        await chaos.load.expect()
        chaos.begin()
        killing = asyncio.create_task(kill(chaos, scenario))
        never = asyncio.Event()
        try:
            async with asyncio.TaskGroup() as tasks:
                for number in range(arguments.clients):
                    tasks.create_task(chaos.load.client(number, never, arguments.requests))
        finally:
            killing.cancel()
        duration_s = chaos.load.now_s()
        await chaos.recover()
        owned, settle_s = await chaos.settle(SETTLE_S)
        title = f"kill-{arguments.role} every {arguments.every_s:g} s"
        facts = chaos.facts(title, duration_s=duration_s, clients=arguments.clients, owned=owned, settle_s=settle_s)
        return Report.of(facts)


async def kill(chaos: ChaosRun, scenario: Scenario) -> None:
    """A kill every so often, until cancelled."""
    for turn in itertools.count():
        at_s = (turn + 0.5) * scenario.every_s
        await chaos.striker.run([Strike(at_s=at_s, scenario=scenario, turn=turn, seed=turn)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("decode", "prefill", "router"), default="decode")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100, help="of each client")
    parser.add_argument("--every-s", type=float, default=5.0)
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--json", type=Path, help="write the report there too")
    arguments = parser.parse_args()
    options = ["--launcher", arguments.launcher]
    options += settings(
        "name=worker-loss",
        "router.http=127.0.0.1:0",
        "router.grpc=127.0.0.1:0",
        "kv.memory=64MiB",
        f"{arguments.role}.replicas=2",
        *arguments.set,
    )
    with (
        tempfile.TemporaryDirectory() as folder,
        Cluster(Path(folder), options) as cluster,
    ):
        cluster.use_its_runs()
        cluster.wait_ready()
        report = asyncio.run(run(cluster, arguments))
    Console(width=140).print(render(report))
    if arguments.json:
        arguments.json.write_text(json.dumps(report.as_dict(), indent=2))
    sys.exit(bool(report.broken))


if __name__ == "__main__":
    main()
