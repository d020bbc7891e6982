"""Greedy tokens through the whole cluster over HTTP equal transformers' `generate`, family by family, in fp32."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
import transformers
from cluster_process import Cluster, complete
from model_factory import CASES, write_checkpoint

from baton.config import resolve_model_path

LENGTHS = [1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 47, 64, 100, 129, 200, 257, 400, 640, 1000, 1500]
NUM_TOKENS = 64
LOGPROB_TOLERANCE = 1e-4

pytestmark = pytest.mark.cluster


def reference(folder: Path, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """Tokens and their log-probabilities from transformers, one prompt at a time."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    answers = []
    for prompt in prompts:
        output: Any = model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            max_new_tokens=NUM_TOKENS,
            min_new_tokens=NUM_TOKENS,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
            pad_token_id=0,
            # As `ignore_eos`: min_new_tokens would mask the end tokens instead of passing over them.
            eos_token_id=-1,
        )
        tokens = output.sequences[0, len(prompt) :].tolist()
        logprobs = [
            float(torch.log_softmax(logits[0].double(), -1)[token])
            for logits, token in zip(output.logits, tokens, strict=True)
        ]
        answers.append((tokens, logprobs))
    return answers


async def served(url: str, prompts: list[list[int]]) -> list[tuple[list[int], list[float]]]:
    """The same from the cluster, all prompts at once."""
    async with httpx.AsyncClient(timeout=300) as client:
        answers = await asyncio.gather(
            *(complete(client, url, p, max_tokens=NUM_TOKENS, logprobs=0, ignore_eos=True) for p in prompts)
        )
    return [(tokens, body["choices"][0]["logprobs"]["token_logprobs"]) for tokens, body in answers]


@pytest.mark.parametrize("case", [*CASES, "shipped"])
def test_tokens_equal_transformers(case: str, tmp_path: Path) -> None:
    generator = random.Random(3)
    if case == "shipped":
        folder, vocabulary = resolve_model_path("tiny"), 4000
    else:
        folder, vocabulary = write_checkpoint(tmp_path / "model", case), 256
    prompts = [[generator.randrange(vocabulary) for _ in range(length)] for length in LENGTHS]
    expected = reference(folder, prompts)
    settings = {"model__path": folder, "model__dtype": "float32", "model__served_name": "m"}
    with Cluster(tmp_path / "run", **settings, routing__disaggregate="always") as cluster:
        answers = asyncio.run(served(cluster.url, prompts))
        workers = cluster.wait_until_settled()
    for prompt, (tokens, logprobs), (want_tokens, want_logprobs) in zip(prompts, answers, expected, strict=True):
        assert tokens == want_tokens, f"prompt of {len(prompt)} tokens"
        worst = max(abs(a - b) for a, b in zip(logprobs, want_logprobs, strict=True))
        assert worst <= LOGPROB_TOLERANCE, f"prompt of {len(prompt)} tokens: {worst}"
    assert {worker["role"] for worker in workers.values()} == {"prefill", "decode"}
