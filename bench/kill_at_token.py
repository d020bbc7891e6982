"""Kills the worker that serves a stream at a chosen point, for every point, and compares the client's tokens.

Usage: python bench/kill_at_token.py [--role decode] [--points 32] [--set key=value ...]

Starts `baton up` (launcher local, the model that ships, eight workers of that role, since one that dies again and again
is started anew after ever longer pauses; faults allowed at run time), notes
each answer with nobody disturbed, then for every K in 1..`--points` (decode), or for every layer group of every chunk
(prefill), makes one worker kill itself (SIGKILL) as it is about to send its Kth token, or has just offered its Kth
layer group. Greedy and sampled. Prints answers that differ or failed, how long after the death the router knew of it,
how long the client waited for its next token, and the KV blocks still owned on the survivors. Some minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import statistics
import tempfile
import threading
import time
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import grpc
import httpx
from rich.console import Console
from rich.progress import track
from rich.table import Table

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from rank_loss import Cluster, is_gone, wait

MODES: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0},
    "sampled": {"temperature": 1.0, "seed": 20261121, "top_p": 0.95, "presence_penalty": 0.3},
}
MAX_TOKENS = 48
PROMPT = "".join(f"def mean_{line}(values):\n    return sum(values) / {line + 1}\n" for line in range(24))
TRIES = 12
SETTLE_S = 5.0


@dataclass(slots=True)
class Kill:
    """One stream whose worker died. Times in seconds; -1: not seen."""

    mode: str
    point: int
    is_exact: bool
    error: str = ""
    noticed_s: float = -1.0
    stall_s: float = -1.0
    owned: int = 0


@dataclass(slots=True)
class Heard:
    """A stream as its client heard it: ids, and when each came."""

    ids: list[int] = field(default_factory=list)
    times_s: list[float] = field(default_factory=list)
    error: str = ""


async def ask(url: str, mode: str, salt: str) -> Heard:
    """One completion, streamed."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": MAX_TOKENS, "ignore_eos": True, **MODES[mode]}
    body |= {"stream": True, "return_token_ids": True, "cache_salt": salt}
    heard = Heard()
    async with (
        httpx.AsyncClient(timeout=60, trust_env=False) as client,
        client.stream("POST", f"{url}/v1/completions", json=body) as response,
    ):
        if response.is_error:
            heard.error = f"{response.status_code}: {(await response.aread()).decode()[:200]}"
            return heard
        async for line in response.aiter_lines():
            if line.startswith("data: {"):
                chunk = json.loads(line[6:])
                if "error" in chunk:
                    heard.error = chunk["error"]["message"]
                    break
                ids = [token_id for choice in chunk["choices"] for token_id in choice["token_ids"]]
                heard.ids += ids
                heard.times_s += [time.time()] * len(ids)
    return heard


class Death(threading.Thread):
    """Notes when a process is gone."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.pid = pid
        self.at_s: float | None = None
        self.over = False
        self.start()

    def run(self) -> None:
        """Looks every millisecond, until it is gone or nobody asks any more."""
        while not self.over and self.at_s is None:
            if is_gone(self.pid):
                self.at_s = time.time()
            time.sleep(0.001)


def kill_at(cluster: Cluster, url: str, log: Path, role: str, mode: str, point: int, wanted: list[int]) -> Kill:
    """Streams until the armed worker was the one that served, and died."""
    where = "emit" if role == "decode" else "layers"
    for turn in range(TRIES):
        target = wait(lambda: ready(cluster, role), "two workers to be ready")
        if not arm(target.address, [f"{target.instance_id} {where} nth={point} kill"]):
            time.sleep(0.2)
            continue
        death = Death(target.ranks[0].pid)
        begin = log.stat().st_size
        heard = asyncio.run(ask(url, mode, f"{role}-{mode}-{point}-{turn}"))
        if death.at_s is None:
            death.over = True
            if not is_gone(target.ranks[0].pid):
                arm(target.address, [])
                continue
        assert death.at_s is not None
        later = [at_s for at_s in heard.times_s if at_s > death.at_s]
        kill = Kill(mode, point, heard.ids == wanted and not heard.error, heard.error)
        kill.stall_s = later[0] - death.at_s if later else -1.0
        kill.noticed_s = noticed(log, begin, target.instance_id, death.at_s)
        end_s = time.monotonic() + SETTLE_S
        while (owned := sum(status.load.kv_blocks_owned for status in cluster.instances().values())) and (
            time.monotonic() < end_s
        ):
            time.sleep(0.05)
        kill.owned = owned
        return kill
    raise SystemExit(f"{TRIES} streams, and none was served by the armed {role} worker")


def arm(address: str, rules: list[str]) -> bool:
    """Replaces the faults of a worker; false where it is gone."""
    with grpc.insecure_channel(address) as channel:
        try:
            rpc.WorkerStub(channel).SetFaults(pb.SetFaultsRequest(rules=rules), timeout=5.0)
        except grpc.RpcError:
            return False
    return True


def ready(cluster: Cluster, role: str) -> Any:
    """The worker that an idle router takes first, once two of its role are ready, and everybody else is."""
    found = cluster.instances()
    of_role = sorted(name for name, status in found.items() if status.role == role and status.state == "ready")
    others = all(status.state == "ready" for status in found.values() if status.role != role)
    return found[of_role[0]] if len(of_role) >= 2 and others else None


def noticed(log: Path, begin: int, instance_id: str, death_s: float) -> float:
    """When the router first wrote of the loss, in seconds after it; -1 if it did not."""
    with log.open() as lines:
        lines.seek(begin)
        for line in lines:
            entry = json.loads(line) if line.startswith("{") else {}
            if instance_id in entry.get("message", "") and entry.get("level") == "warning":
                return datetime.fromisoformat(entry["time"]).timestamp() - death_s
    return -1.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("decode", "prefill"), default="decode")
    parser.add_argument(
        "--points", type=int, help="tokens (32), or layer groups over all chunks (12: the prompt has two)"
    )
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    num_points = arguments.points or (32 if arguments.role == "decode" else 12)
    settings = ["name=kill-at-token", "router.http=127.0.0.1:0", "router.grpc=127.0.0.1:0", "kv.memory=32MiB"]
    settings += [
        "routing.disaggregate=always",
        # Of workers that are idle it takes the first; what a prompt left where does not count.
        "routing.policy=least_loaded",
        f"{arguments.role}.replicas=8",
        "transfer.layers_per_group=1",
        "log.format=json",
    ]
    settings += ["faults.allow_at_runtime=true", "transfer.one_message_below_tokens=0", *arguments.set]
    options = ["--launcher", "local", *(word for pair in settings for word in ("--set", pair))]
    kills: list[Kill] = []
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), options)
        try:
            found = cluster.wait_ready()
            log = next(Path(folder).rglob("router-0.log"))
            wanted = {mode: asyncio.run(ask(found["router-0"].http_url, mode, "undisturbed")).ids for mode in MODES}
            assert all(len(ids) == MAX_TOKENS for ids in wanted.values()), wanted
            points = list(itertools.product(MODES, range(1, num_points + 1)))
            for mode, point in track(points, f"killing {arguments.role} workers", console=Console(stderr=True)):
                url = found["router-0"].http_url
                kills.append(kill_at(cluster, url, log, arguments.role, mode, point, wanted[mode]))
        finally:
            cluster.stop()
    show(arguments.role, kills)


def show(role: str, kills: list[Kill]) -> None:
    """The table."""
    table = Table(title=f"{role} worker killed at each of {len(kills)} points, ms")
    for column in (
        "mode",
        "kills",
        "differ or failed",
        "router knew after p50 / max",
        "client waited p50 / max",
        "owned",
    ):
        table.add_column(column)
    for mode in MODES:
        mine = [kill for kill in kills if kill.mode == mode]
        wrong = [str(kill.point) for kill in mine if not kill.is_exact]
        owned = str(sum(kill.owned for kill in mine))
        knew, waits = figures([kill.noticed_s for kill in mine]), figures([kill.stall_s for kill in mine])
        table.add_row(mode, str(len(mine)), ", ".join(wrong) or "none", knew, waits, owned)
    Console(width=140).print(table)
    for kill in kills:
        if kill.error:
            print(f"{kill.mode}, point {kill.point}: {kill.error}")


def figures(values_s: list[float]) -> str:
    """Median and largest of those that were seen, in ms."""
    seen = [1000 * value_s for value_s in values_s if value_s >= 0]
    return f"{statistics.median(seen):.0f} / {max(seen):.0f}" if seen else "-"


if __name__ == "__main__":
    main()
