"""`baton up` over two Ray nodes that share neither loopback nor shared memory: pools on both, the client outside."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from cluster_process import Cluster
from netns import TwoNodes, why_not

_REASON = why_not()
pytestmark = [
    pytest.mark.cluster,
    pytest.mark.timeout(280),
    pytest.mark.skipif(bool(_REASON), reason=_REASON or "two nodes can be made"),
]

EXAMPLE = Path(__file__).parents[2] / "deploy" / "examples" / "two-nodes.yaml"
PROMPT = "def main(argv):\n    for"


@pytest.fixture(scope="module", name="nodes")
def _nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    with TwoNodes(tmp_path_factory.mktemp("nodes")) as nodes:
        yield nodes


def cluster_on(nodes: TwoNodes, folder: Path, config: Path | None = None, **settings: Any) -> Cluster:
    """A cluster whose `baton up` and router are on node 0; `settings` are added to those of `config`."""
    common = {
        "ray.address": nodes.ray_address,
        "router.http": f"{nodes.addresses[0]}:0",
        "routing.disaggregate": "always",
        "insecure": True,
        "prefill.host": "auto",
        "decode.host": "auto",
        "kv.memory": "32MiB",
        "device": "cpu",
    }
    return Cluster(
        folder,
        launcher="ray",
        wrap=lambda *command: nodes.command(0, *command),
        environment=nodes.environment,
        config=config,
        **common,
        **settings,
    )


def complete(cluster: Cluster) -> tuple[str, str]:
    """(text, prefill instance) of one greedy completion."""
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 8, "temperature": 0}
    response = httpx.post(f"{cluster.url}/v1/completions", json=body, timeout=60)
    assert response.status_code == 200, response.text
    assert response.json()["usage"]["completion_tokens"] == 8
    return response.json()["choices"][0]["text"], response.headers["X-Baton-Prefill-Instance"]


async def stream(client: openai.AsyncOpenAI, prompt: str) -> str:
    """A streamed greedy chat answer of an OpenAI client."""
    chunks = await client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": prompt}], max_tokens=12, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks if chunk.choices])


async def answers(cluster: Cluster) -> list[str]:
    """What the cluster says to eight clients at once."""
    async with openai.AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=120) as client:
        prompts = [f"def area_{index}(width, height):\n" * (1 + 5 * index) for index in range(8)]
        return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))


def hosts_of(instance: dict[str, Any]) -> list[str]:
    return [rank["host"] for rank in instance["ranks"]]


def test_pools_on_two_nodes_hand_over_to_each_other(nodes: TwoNodes, tmp_path: Path) -> None:
    with cluster_on(nodes, tmp_path) as cluster:
        status = cluster.status()
        # Two instances and two nodes: one on each.
        assert {*hosts_of(status["prefill-0"]), *hosts_of(status["decode-0"])} == set(nodes.addresses)
        assert complete(cluster)[1] == "prefill-0"
        cluster.wait_until_settled()


def test_two_stages_of_two_ranks_on_both_nodes_answer_as_one_rank_does(nodes: TwoNodes, tmp_path: Path) -> None:
    # In fp32, since sums run in another order over two ranks than over one.
    with cluster_on(nodes, tmp_path / "two", EXAMPLE, **{"model.dtype": "float32"}) as cluster:
        status = cluster.status()
        for instance in ("prefill-0", "decode-0"):
            assert (status[instance]["tensor_parallel"], status[instance]["pipeline_parallel"]) == (2, 2)
            hosts = hosts_of(status[instance])
            assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
            assert set(hosts) == set(nodes.addresses)
        assert complete(cluster)[1] == "prefill-0"
        given = asyncio.run(answers(cluster))
        cluster.wait_until_settled()
    settings = {"model.dtype": "float32", "kv.memory": "32MiB", "routing.disaggregate": "always"}
    with Cluster(tmp_path / "one", **settings) as single:
        assert given == asyncio.run(answers(single))


def test_stages_on_two_nodes_serve_and_the_loss_of_a_remote_rank_is_told(nodes: TwoNodes, tmp_path: Path) -> None:
    settings = {"decode.tensor_parallel": 2, "decode.pipeline_parallel": 2}
    with cluster_on(nodes, tmp_path, **settings) as cluster:
        decode = cluster.status()["decode-0"]
        assert (decode["tensor_parallel"], decode["pipeline_parallel"]) == (2, 2)
        hosts = hosts_of(decode)
        assert hosts[0] == hosts[1] != hosts[2] == hosts[3]
        assert set(hosts) == set(nodes.addresses)
        text, prefill = complete(cluster)
        assert prefill == "prefill-0"
        cluster.wait_until_settled()
        remote = next(rank for rank in decode["ranks"] if rank["host"] == nodes.addresses[1])
        os.kill(remote["pid"], signal.SIGKILL)
        # Ray says it, or the rank that waited for it in vain, whoever is heard first.
        rank, pid, host = remote["rank"], remote["pid"], re.escape(nodes.addresses[1])
        by_ray = rf"rank {rank} was lost.*on node {host}"
        by_rank = rf"rank \d+ failed: rank {rank} of decode-0 \(pid {pid} on {host}\)"
        note = re.compile(f"decode-0 ended: (?:{by_ray}|{by_rank})")
        until_s = time.monotonic() + 60
        while not note.search(cluster.log()) or cluster.status()["decode-0"]["state"] != "ready":
            assert time.monotonic() < until_s, cluster.log()
            time.sleep(0.2)
        assert complete(cluster)[0] == text
