"""A rank of a prefill worker dies while it reads: the other prefill worker, of several ranks too, reads the prompt."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from cluster_process import Cluster, complete

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

PROMPT = [40 + (7 * position) % 400 for position in range(150)]
OPTIONS: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "ignore_eos": True, "temperature": 0.8, "seed": 5}


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    settings = {
        "kv.memory": "32MiB",
        "prefill.replicas": 2,
        "prefill.tensor_parallel": 2,
        "prefill.block_size": 8,
        "decode.pipeline_parallel": 2,
        "transfer.layers_per_group": 1,
        "transfer.one_message_below_tokens": 0,
        "faults.allow_at_runtime": "true",
        "routing.disaggregate": "always",
        "routing.policy": "least_loaded",
        "stop_grace_s": 5,
    }
    with Cluster(tmp_path_factory.mktemp("parallel-retry"), **settings) as cluster:
        yield cluster


def _retries(cluster: Cluster) -> float:
    page = httpx.get(f"{cluster.url}/metrics", trust_env=False).text
    found = re.search(r'^baton_prefill_retries_total\{outcome="attached"\S* (\S+)$', page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def _until_whole(cluster: Cluster) -> dict[str, dict[str, Any]]:
    """Every worker is ready, and none owns a block."""
    until_s = time.monotonic() + 60
    while True:
        found = cluster.wait_until_settled()
        if all(worker["state"] == "ready" for worker in found.values()):
            return found
        assert time.monotonic() < until_s, cluster.log()


def _delays(cluster: Cluster) -> int:
    """How often prefill-0 was held up between two groups of layers, by its log."""
    logs = Path(cluster.state["log_dir"]).glob("prefill-0*")
    return sum(log.read_text().count("(event 2), for the 1th time") for log in logs)


def _until(is_so: Callable[[], bool], cluster: Cluster) -> None:
    until_s = time.monotonic() + 30
    while not is_so():
        assert time.monotonic() < until_s, cluster.log()
        time.sleep(0.02)


def _arm(address: str, *rules: str) -> None:
    with grpc.insecure_channel(address) as channel:
        rpc.WorkerStub(channel).SetFaults(pb.SetFaultsRequest(rules=rules), timeout=5.0)


async def _ask(cluster: Cluster, salt: str, victim: int | None = None) -> list[int]:
    """Token ids of the answer; nothing is cached under a salt of its own. `victim`: killed in the midst of reading."""
    delays = _delays(cluster)
    async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
        asked = asyncio.create_task(complete(client, cluster.url, PROMPT, cache_salt=salt, **OPTIONS))
        if victim is not None:
            await asyncio.to_thread(_until, lambda: _delays(cluster) > delays, cluster)
            assert not asked.done()
            os.kill(victim, signal.SIGKILL)
        return (await asked)[0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_prefill_worker_goes_on(cluster: Cluster, rank: int) -> None:
    wanted = asyncio.run(_ask(cluster, f"undisturbed {rank}"))
    # Of two that are idle the router takes the first.
    first = _until_whole(cluster)["prefill-0"]
    _arm(first["address"], "prefill-0 layers nth=2 delay for=20")
    before = _retries(cluster)
    assert asyncio.run(_ask(cluster, f"disturbed {rank}", first["ranks"][rank]["pid"])) == wanted
    # Both are told a moment after the answer has come, or before.
    _until(lambda: _retries(cluster) > before, cluster)
    assert _retries(cluster) == before + 1
    _until(lambda: f"prefill-0 ended: rank {rank} was killed by SIGKILL" in cluster.log(), cluster)
    cluster.wait_until_settled()
