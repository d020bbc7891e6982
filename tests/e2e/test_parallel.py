"""Instances of several processes through `baton up`: the same answers, and what becomes of them when one is killed."""

from __future__ import annotations

import asyncio
import itertools
import os
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import openai
import pytest
from cluster_process import Cluster

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

# In fp32: the order of sums differs between layouts, and bf16 would round that into other tokens now and then.
_COMMON = {
    "model.dtype": "float32",
    "kv.memory": "32MiB",
    "routing.disaggregate": "always",
    "stop_grace_s": 5,
}
_LAYOUT = {
    "prefill.pipeline_parallel": 2,
    "prefill.block_size": 8,
    "decode.tensor_parallel": 2,
    "transfer.transport": "gloo",
}
_PROMPTS = [f"class Node{index}:\n    def __init__(self, value):\n" * (1 + 4 * index) for index in range(6)]


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with Cluster(tmp_path_factory.mktemp("parallel"), **_COMMON, **_LAYOUT) as cluster:
        yield cluster


@pytest.fixture(scope="module", name="wanted")
def _wanted(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """What single ranks answer."""
    with Cluster(tmp_path_factory.mktemp("single"), **_COMMON) as cluster:
        return [text for text, _ in asyncio.run(_ask(cluster))]


async def _ask(
    cluster: Cluster, max_tokens: int = 48, on_begin: Callable[[], object] = lambda: None
) -> list[tuple[str, str]]:
    """(text, error) of all prompts at once, half of them sampled, streamed to an OpenAI client that does not retry.

    `on_begin` is called for each with its first chunk.
    """
    url = f"{cluster.url}/v1"
    async with openai.AsyncOpenAI(base_url=url, api_key="none", timeout=60, max_retries=0) as client:
        return await asyncio.gather(*(_stream(client, index, max_tokens, on_begin) for index in range(len(_PROMPTS))))


async def _stream(
    client: openai.AsyncOpenAI, index: int, max_tokens: int, on_begin: Callable[[], object]
) -> tuple[str, str]:
    text, has_begun = "", False
    try:
        chunks = await client.completions.create(
            model="tiny",
            prompt=_PROMPTS[index],
            max_tokens=max_tokens,
            temperature=0.8 * (index % 2),
            seed=index,
            stream=True,
        )
        async for chunk in chunks:
            if not has_begun:
                has_begun = True
                on_begin()
            text += chunk.choices[0].text
    except openai.APIError as error:
        return text, str(error)
    return text, ""


def _wait(cluster: Cluster, instance: str, *, not_incarnation: str) -> None:
    until_s = time.monotonic() + 60
    while True:
        status: dict[str, Any] = cluster.status().get(instance, {})
        if status.get("state") == "ready" and status["incarnation"] != not_incarnation:
            return
        assert time.monotonic() < until_s, cluster.log()
        time.sleep(0.1)


def test_the_answers_are_those_of_single_ranks(cluster: Cluster, wanted: list[str]) -> None:
    assert asyncio.run(_ask(cluster)) == [(text, "") for text in wanted]
    cluster.wait_until_settled()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_prefill_rank_that_is_killed_costs_no_answer(cluster: Cluster, wanted: list[str], rank: int) -> None:
    before = cluster.status()
    asking = asyncio.run(_ask_and_kill(cluster, before["prefill-0"]["ranks"][rank]["pid"], 48, after=1))
    assert asking == [(text, "") for text in wanted]
    _wait(cluster, "prefill-0", not_incarnation=before["prefill-0"]["incarnation"])
    assert f"prefill-0 ended: rank {rank} was killed by SIGKILL" in cluster.log()
    assert cluster.status()["decode-0"]["incarnation"] == before["decode-0"]["incarnation"]
    assert asyncio.run(_ask(cluster)) == [(text, "") for text in wanted]
    cluster.wait_until_settled()


@pytest.mark.parametrize("rank", [0, 1])
def test_a_decode_rank_that_is_killed_ends_its_instance_and_no_stream(
    cluster: Cluster, wanted: list[str], rank: int
) -> None:
    before = cluster.status()
    pids = [each["pid"] for each in before["decode-0"]["ranks"]]
    disturbed = asyncio.run(_ask_and_kill(cluster, pids[rank], 200, after=len(_PROMPTS)))
    assert disturbed == asyncio.run(_ask(cluster, 200))
    assert not any(error for _, error in disturbed)
    _wait(cluster, "decode-0", not_incarnation=before["decode-0"]["incarnation"])
    assert f"decode-0 ended: rank {rank} was killed by SIGKILL" in cluster.log()
    assert not any(_is_running(pid) for pid in pids)
    assert cluster.status()["prefill-0"]["incarnation"] == before["prefill-0"]["incarnation"]
    assert asyncio.run(_ask(cluster)) == [(text, "") for text in wanted]
    cluster.wait_until_settled()


async def _ask_and_kill(cluster: Cluster, pid: int, max_tokens: int, *, after: int) -> list[tuple[str, str]]:
    """Kills the process when so many of the answers have begun."""
    num_begun = itertools.count(1)

    def on_begin() -> None:
        if next(num_begun) == after:
            os.kill(pid, signal.SIGKILL)

    return await _ask(cluster, max_tokens, on_begin)


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
