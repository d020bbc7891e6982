"""What clients that vanish leave behind: how long until their KV blocks have settled, and what processes keep.

Usage: python bench/vanishing.py [--clients 1000] [--at-once 32] [--seed 1] [--lease-s 30] [--set key=value ...]

Starts `baton up` (launcher local, the model that ships), and has `--clients` clients begin a request and leave without
a word, `--at-once` of them at a time: before the answer, during the prefill, at the first token, in mid-stream; half
over HTTP, half over gRPC. Prints how long after the last one all blocks had settled, and memory and descriptors of
every process before and after. Exit code 1 when blocks are owned for longer than a lease and a second. About a minute.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton.cluster.chaos.processes import descriptors, resident_bytes
from baton.cluster.chaos.run import ChaosRun
from own_cluster import Cluster, settings

_WARM_UP_CLIENTS = 60
_REST_S = 3.0


async def run(cluster: Cluster, arguments: argparse.Namespace) -> bool:
    """Whether everything settled in time."""
    async with ChaosRun(cluster.run_state) as chaos:
        await chaos.load.expect()
        await chaos.vanishers.leave(_WARM_UP_CLIENTS, 0, at_once=arguments.at_once)
        await chaos.settle(arguments.lease_s + 1)
        before = processes(chaos)
        began_s = time.monotonic()
        counted = await chaos.vanishers.leave(arguments.clients, arguments.seed, at_once=arguments.at_once)
        took_s = time.monotonic() - began_s
        owned, settle_s = await chaos.settle(arguments.lease_s + 1)
        await asyncio.sleep(_REST_S)
        after = processes(chaos)
        # The cluster must be as it was for whoever comes next.
        await chaos.load.expect()
    phases = ", ".join(f"{count} {phase}" for phase, count in sorted(counted.items()))
    print(f"{arguments.clients} clients left within {took_s:.1f} s: {phases}")
    said = "blocks still owned" if settle_s is None else f"all blocks settled {settle_s:.2f} s after the last one"
    print(f"{said} (bound {arguments.lease_s + 1:g} s): " + ", ".join(f"{name} {n}" for name, n in owned.items()))
    table = Table(title="processes before and after")
    for column in ("process", "RSS MiB before", "after", "descriptors before", "after"):
        table.add_column(column, justify="left" if column == "process" else "right")
    for key, (bytes_before, open_before) in before.items():
        bytes_after, open_after = after.get(key, (0, 0))
        row = f"{bytes_before / 2**20:.1f}", f"{bytes_after / 2**20:.1f}", str(open_before), str(open_after)
        table.add_row(key[0], *row)
    Console(width=120).print(table)
    return settle_s is not None


def processes(chaos: ChaosRun) -> dict[tuple[str, int], tuple[int, int]]:
    """(resident bytes, descriptors) by (instance, pid)."""
    return {
        (member.instance_id, rank.pid): (resident_bytes(rank.pid), descriptors(rank.pid))
        for member in chaos.observer.listed()
        for rank in member.ranks
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=1000)
    parser.add_argument("--at-once", type=int, default=32)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lease-s", type=float, default=30.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    options = settings(
        "name=vanishing",
        "router.http=127.0.0.1:0",
        "router.grpc=127.0.0.1:0",
        "kv.memory=32MiB",
        f"transfer.lease_s={arguments.lease_s:g}",
        *arguments.set,
    )
    with tempfile.TemporaryDirectory() as folder, Cluster(Path(folder), ["--launcher", "local", *options]) as cluster:
        cluster.use_its_runs()
        cluster.wait_ready()
        settled = asyncio.run(run(cluster, arguments))
    sys.exit(not settled)


if __name__ == "__main__":
    main()
