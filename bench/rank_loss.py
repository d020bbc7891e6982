"""Measures how long a cluster takes to notice that one rank of an instance is gone, and to be whole again.

Usage: python bench/rank_loss.py [--launcher local] [--tensor-parallel 2] [--pipeline-parallel 2] [--set key=value ...]

Starts `baton up` with the model that ships and a decode instance of several ranks, kills each rank in turn (SIGKILL),
and prints for each: until the registry no longer lists the instance as ready, what it was told, until all ranks of that
start are gone, until it is ready again, and whether any other instance was touched. About a minute on two idle cores.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from baton.proto.baton.v1 import worker_pb2 as pb
from own_cluster import Cluster, wait

__all__ = ["Cluster", "is_gone", "wait"]


def is_gone(pid: int) -> bool:
    """Whether no such process runs; one that nobody has waited for yet counts as gone."""
    try:
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--launcher", default="local")
    parser.add_argument("--tensor-parallel", type=int, default=2)
    parser.add_argument("--pipeline-parallel", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = [
        "name=rank-loss",
        "router.http=127.0.0.1:0",
        "router.grpc=127.0.0.1:0",
        "kv.memory=32MiB",
        f"decode.tensor_parallel={arguments.tensor_parallel}",
        f"decode.pipeline_parallel={arguments.pipeline_parallel}",
        *arguments.set,
    ]
    options = ["--launcher", arguments.launcher, *(word for pair in settings for word in ("--set", pair))]
    table = Table(title=f"decode-0 with TP {arguments.tensor_parallel} x PP {arguments.pipeline_parallel}, ms")
    for column in ("rank killed", "not ready after", "told", "all ranks gone after", "ready again after", "others"):
        table.add_column(column)
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), options)
        try:
            for rank in range(arguments.tensor_parallel * arguments.pipeline_parallel):
                table.add_row(*lose(cluster, rank))
        finally:
            cluster.stop()
    Console(width=140).print(table)


def lose(cluster: Cluster, rank: int) -> list[str]:
    """Kills one rank; the row of the table."""
    before = cluster.wait_ready()
    pids = [each.pid for each in before["decode-0"].ranks]
    begin_s = time.monotonic()

    def ms() -> str:
        return f"{1000 * (time.monotonic() - begin_s):.0f}"

    os.kill(pids[rank], signal.SIGKILL)
    wait(lambda: cluster.instances().get("decode-0", pb.WorkerStatus()).state != "ready", "decode-0 to be noticed")
    noticed = ms()
    wait(lambda: all(is_gone(pid) for pid in pids), "the other ranks to end")
    gone = ms()
    after = cluster.wait_ready(before["decode-0"].incarnation)
    whole = ms()
    touched = [name for name in before if name != "decode-0" and before[name].incarnation != after[name].incarnation]
    log = Path(cluster._log.name).read_text(errors="replace")
    told = re.findall(r"decode-0[^\n]*(rank \d+ was [a-z ]+(?:SIGKILL)?)", log)
    return [str(rank), noticed, told[-1] if told else "?", gone, whole, ", ".join(touched) or "untouched"]


if __name__ == "__main__":
    main()
