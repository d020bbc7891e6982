"""What clients feel while workers are killed under load: failed requests, wrong tokens, and how long streams stall.

Usage: python bench/worker_loss.py [--role decode] [--clients 8] [--requests 100] [--every-s 5] [--set key=value ...]

Starts `baton up` (launcher local, the model that ships, two decode workers), asks once for each prompt with nobody
disturbed, then has `--clients` clients stream `--requests` requests each while one worker of `--role` is killed
(SIGKILL) every `--every-s` seconds, in turn. Half of the requests are sampled. Prints requests that failed, answers
that differ from the undisturbed ones, streams that a kill hit, the longest waits for a token, and the KV blocks that
are still owned afterwards. A few minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.table import Table

from rank_loss import Cluster

PROMPTS = 24
MAX_TOKENS = 96
SETTLE_S = 15.0


@dataclass(slots=True)
class Seen:
    """What the clients saw. Waits are between tokens, and from the request to the first one, in seconds."""

    failures: list[str] = field(default_factory=list)
    wrong: int = 0
    answers: int = 0
    killed: int = 0
    longest_waits_s: list[float] = field(default_factory=list)


def body_of(index: int) -> dict[str, Any]:
    """The request of that number; lengths from a few to some hundred prompt tokens."""
    lines = "".join(f"value_{index}_{line} = {line * index}\n" for line in range(1 + index))
    sampling = {"temperature": 0.9, "seed": index, "top_p": 0.95} if index % 2 else {"temperature": 0}
    return {"model": "tiny", "prompt": lines, "max_tokens": MAX_TOKENS, "ignore_eos": True, **sampling}


async def ask(client: httpx.AsyncClient, url: str, index: int) -> tuple[list[int], float]:
    """Token ids of one stream, and its longest wait.

    Raises:
        RuntimeError: the stream told of an error.
        httpx.HTTPError: it broke, or the request was refused.
    """
    request = {**body_of(index), "stream": True, "return_token_ids": True}
    ids: list[int] = []
    then_s, longest_s = time.monotonic(), 0.0
    async with client.stream("POST", f"{url}/v1/completions", json=request) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise RuntimeError(chunk["error"]["message"])
            ids += [token_id for choice in chunk["choices"] for token_id in choice["token_ids"]]
            longest_s, then_s = max(longest_s, time.monotonic() - then_s), time.monotonic()
    return ids, longest_s


async def load(url: str, clients: int, requests: int, seen: Seen, began: asyncio.Event) -> None:
    """Every client one request after another; `began` is set when nobody is to be undisturbed any more."""
    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(timeout=120, limits=limits, trust_env=False) as client:
        wanted = [(await ask(client, url, index))[0] for index in range(PROMPTS)]
        began.set()

        async def one(number: int) -> None:
            draw = random.Random(number)
            for _ in range(requests):
                index = draw.randrange(PROMPTS)
                try:
                    ids, longest_s = await ask(client, url, index)
                except (RuntimeError, httpx.HTTPError) as error:
                    seen.failures.append(str(error) or type(error).__name__)
                    continue
                seen.answers += 1
                seen.wrong += ids != wanted[index]
                seen.longest_waits_s.append(longest_s)

        await asyncio.gather(*(one(number) for number in range(clients)))


async def kill(cluster: Cluster, role: str, every_s: float, began: asyncio.Event, seen: Seen) -> None:
    """Kills a worker of `role` every `every_s` seconds, in turn, until cancelled."""
    await began.wait()
    for turn in itertools.count():
        await asyncio.sleep(every_s)
        statuses = [status for status in cluster.instances().values() if status.role == role]
        status = statuses[turn % len(statuses)]
        if status.state == "ready":
            os.kill(status.ranks[0].pid, signal.SIGKILL)
            seen.killed += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--role", choices=("decode", "prefill"), default="decode")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=100, help="of each client")
    parser.add_argument("--every-s", type=float, default=5.0)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    arguments = parser.parse_args()
    settings = ["name=worker-loss", "router.http=127.0.0.1:0", "router.grpc=127.0.0.1:0", "kv.memory=64MiB"]
    settings += ["decode.replicas=2", *arguments.set]
    options = ["--launcher", "local", *(word for pair in settings for word in ("--set", pair))]
    seen = Seen()
    with tempfile.TemporaryDirectory() as folder:
        cluster = Cluster(Path(folder), options)
        try:
            cluster.wait_ready()
            url = next(status.http_url for status in cluster.instances().values() if status.role == "router")
            asyncio.run(run(cluster, url, arguments, seen))
            cluster.wait_ready()
            end_s = time.monotonic() + SETTLE_S
            while (owned := sum_owned(cluster)) and time.monotonic() < end_s:
                time.sleep(0.5)
        finally:
            cluster.stop()
    show(arguments, seen, owned)


async def run(cluster: Cluster, url: str, arguments: argparse.Namespace, seen: Seen) -> None:
    """Load and kills side by side."""
    began = asyncio.Event()
    killing = asyncio.create_task(kill(cluster, arguments.role, arguments.every_s, began, seen))
    try:
        await load(url, arguments.clients, arguments.requests, seen, began)
    finally:
        killing.cancel()


def sum_owned(cluster: Cluster) -> int:
    """KV blocks that some request owns, on all workers, as last announced."""
    return sum(status.load.kv_blocks_owned for status in cluster.instances().values())


def show(arguments: argparse.Namespace, seen: Seen, owned: int) -> None:
    """The table."""
    waits_s = sorted(seen.longest_waits_s)
    longest_s = statistics.median(waits_s), waits_s[len(waits_s) * 99 // 100], waits_s[-1]
    table = Table(title=f"{seen.killed} {arguments.role} workers killed under {arguments.clients} clients")
    for column in ("requests", "failed", "wrong", "longest wait p50 ms", "p99 ms", "max ms", "owned blocks after"):
        table.add_column(column)
    counts = arguments.clients * arguments.requests, len(seen.failures), seen.wrong
    table.add_row(*map(str, counts), *(f"{1000 * value:.0f}" for value in longest_s), str(owned))
    Console(width=140).print(table)
    for text in sorted(set(seen.failures)):
        print("failed:", text)


if __name__ == "__main__":
    main()
