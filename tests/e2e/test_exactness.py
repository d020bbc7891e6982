"""P1 through real processes: the same tokens and log-probabilities, to the bit, however the cluster got there."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
from cluster_process import Cluster, complete
from model_factory import write_checkpoint

pytestmark = pytest.mark.cluster

NUM_TOKENS = 40
SAMPLED: dict[str, Any] = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 50,
    "min_p": 0.01,
    "seed": 1234,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.2,
    "frequency_penalty": 0.1,
}
MODES: dict[str, dict[str, Any]] = {"greedy": {}, "sampled": SAMPLED}
REMOTE = {"routing__disaggregate": "always"}
# name -> settings; every one must give the same bits.
CLUSTERS: dict[str, dict[str, Any]] = {
    "shm": {**REMOTE, "transfer__transport": "shm"},
    "gloo, other blocks, layer groups": {
        **REMOTE,
        "transfer__transport": "gloo",
        "transfer__one_message_below_tokens": 0,
        "transfer__layers_per_group": 1,
        "prefill__block_size": 8,
        "decode__block_size": 32,
        "prefill__max_batch_tokens": 48,
    },
    "local, small chunks": {
        "routing__disaggregate": "never",
        "decode__max_batch_tokens": 37,
        "decode__max_batch_size": 33,
        "cpu__threads": 2,
    },
    "colocated, both cores": {"prefill__replicas": 0},
    "cores of one's own": {**REMOTE, "prefill__cpu__cores": "0", "decode__cpu__threads": 1},
    "preempted": {"routing__disaggregate": "never", "decode__num_blocks": 34},
}

Answer = tuple[list[int], Any]


async def ask(url: str, prompts: list[list[int]], mode: str, *, alone: bool) -> list[Answer]:
    """Token ids and all log-probabilities of each prompt."""
    options = {"max_tokens": NUM_TOKENS, "logprobs": 3, "ignore_eos": True, **MODES[mode]}
    async with httpx.AsyncClient(timeout=300) as client:
        calls = [complete(client, url, prompt, **options) for prompt in prompts]
        answers = [await call for call in calls] if alone else await asyncio.gather(*calls)
    return [(tokens, body["choices"][0]["logprobs"]) for tokens, body in answers]


async def scrape(url: str) -> str:
    """The text of a metrics page."""
    async with httpx.AsyncClient(timeout=30) as client:
        return (await client.get(url)).text


def counter(text: str, name: str) -> float:
    """Sum of one metric over its labels."""
    return sum(float(line.rsplit(" ", 1)[1]) for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_bit_equal_however_served(dtype: str, tmp_path: Path) -> None:
    generator = random.Random(9)
    folder = write_checkpoint(tmp_path / "model", "llama-gqa-bias", dtype=dtype, max_position_embeddings=512)
    lengths = [1, 2, 7, 16, 17, 40, 63, 100, 129, 200, 301, 450]
    prompts = [[generator.randrange(256) for _ in range(length)] for length in lengths]
    filler = [[generator.randrange(256) for _ in range(generator.randrange(1, 90))] for _ in range(20)]
    answers: dict[str, dict[str, list[Answer]]] = {mode: {} for mode in MODES}
    base = {"model__path": folder, "model__served_name": "m"}
    for name, settings in CLUSTERS.items():
        with Cluster(tmp_path / name.replace(" ", "-"), **base, **settings) as cluster:
            for mode, answered in answers.items():
                if name == "shm":
                    answered["alone"] = asyncio.run(ask(cluster.url, prompts, mode, alone=True))
                batch = asyncio.run(ask(cluster.url, [*prompts, *filler], mode, alone=False))
                answered[f"{name}: batch of 32"] = batch[: len(prompts)]
                answered[f"{name}: prefix hits"] = asyncio.run(ask(cluster.url, prompts, mode, alone=False))
            workers = cluster.wait_until_settled()
            decode = asyncio.run(scrape(workers["decode-0"]["metrics_url"]))
            if name == "preempted":
                assert counter(decode, "baton_preemptions_total") > 0
            handed_over = counter(decode, 'baton_handovers_total{outcome="attached"')
            assert (handed_over > 0) == (settings.get("routing__disaggregate") == "always")
    for mode, answered in answers.items():
        for name, answer in answered.items():
            for prompt, got, want in zip(prompts, answer, answered["alone"], strict=True):
                assert got == want, f"{mode}, {name}, prompt of {len(prompt)} tokens"


def test_two_hundred_streams_on_a_pool_too_small_for_them(tmp_path: Path) -> None:
    generator = random.Random(11)
    folder = write_checkpoint(tmp_path / "model", "llama-gqa-bias", max_position_embeddings=256)
    prompts = [[generator.randrange(256) for _ in range(generator.randrange(1, 180))] for _ in range(200)]
    counts = [generator.randrange(1, 60) for _ in prompts]

    async def ask_all(url: str) -> list[list[int]]:
        async with httpx.AsyncClient(timeout=300, limits=httpx.Limits(max_connections=250)) as client:
            calls = [
                complete(client, url, prompt, max_tokens=count, ignore_eos=True)
                for prompt, count in zip(prompts, counts, strict=True)
            ]
            return [tokens for tokens, _ in await asyncio.gather(*calls)]

    base = {"model__path": folder, "model__dtype": "float32", "model__served_name": "m"}
    with Cluster(tmp_path / "large", **base, routing__disaggregate="never") as cluster:
        want = asyncio.run(ask_all(cluster.url))
    small = {"decode__num_blocks": 60, "prefill__num_blocks": 40, "routing__disaggregate": "always"}
    with Cluster(tmp_path / "small", **base, **small) as cluster:
        got = asyncio.run(ask_all(cluster.url))
        workers = cluster.wait_until_settled()
    assert [len(tokens) for tokens in got] == counts
    assert got == want
    for worker in workers.values():
        blocks = worker["kv_blocks"]
        assert blocks["owned"] == 0
        assert blocks["free"] + blocks["cached"] == blocks["total"]
