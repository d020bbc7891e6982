"""Tokens do not depend on the layouts: every (TP, PP) of prefill and decode, every pair of block sizes, over gloo.

Expected tokens are those of one rank that prefills and decodes by itself. Where both halves have the same layout, what
was handed over is also held against what the decode instance computes alone, to the last bit of the log-probabilities.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from rank_harness import RankRouter, ranks
from tests.engine.model_factory import VOCAB_SIZE

from baton.engine.engine import Engine
from baton.engine.request import EngineRequest, RequestOutput, SamplingParams
from baton.engine.runner import ModelRunner

pytestmark = pytest.mark.usefixtures("ranks_in_threads")

_LAYOUTS = list(itertools.product((1, 2), (1, 2)))
_BLOCKS = list(itertools.product((8, 16, 32), repeat=2))
_CASES = [
    *((prefill, decode) for prefill in _LAYOUTS for decode in _LAYOUTS),
    ((4, 1), (1, 1)),
    ((2, 2), (4, 1)),
]
_MAX_BATCH_TOKENS = 96


def requests(prefix: str) -> list[EngineRequest]:
    """20 prompts of 1 to 150 tokens, greedy and sampled in turn; each prefix has a prefix cache of its own."""
    rng = random.Random(7)
    made = []
    for index in range(20):
        prompt = tuple(rng.randrange(VOCAB_SIZE - 70) for _ in range(rng.choice([1, 2, 8, 9, 16, 31, 33, 64, 97, 150])))
        sampling = SamplingParams(
            max_tokens=8,
            temperature=0.0 if index % 2 == 0 else 0.9,
            top_p=0.95,
            seed=index,
            logprobs=2,
            ignore_eos=True,
        )
        made.append(
            EngineRequest(request_id=f"{prefix}{index}", prompt_token_ids=prompt, sampling=sampling, cache_salt=prefix)
        )
    return made


@cache
def expected(model: Path) -> list[list[int]]:
    """The single rank's tokens."""
    runner = ModelRunner(model, num_blocks=120, max_model_len=256, max_batch_tokens=_MAX_BATCH_TOKENS)
    engine = Engine(runner, max_batch_tokens=_MAX_BATCH_TOKENS, max_batch_size=32)
    tokens: dict[str, list[int]] = {}
    sent = requests("alone")
    for request in sent:
        assert not engine.add(request)
    while engine.has_work:
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return [tokens[request.request_id] for request in sent]


def _name(value: Any) -> str:
    return "x".join(map(str, value))


@pytest.mark.parametrize(("prefill", "decode"), _CASES, ids=_name)
@pytest.mark.parametrize("blocks", _BLOCKS, ids=_name)
async def test_tokens_are_the_single_ranks(
    model: Path, prefill: tuple[int, int], decode: tuple[int, int], blocks: tuple[int, int]
) -> None:
    settings = {
        "prefill.tensor_parallel": prefill[0],
        "prefill.pipeline_parallel": prefill[1],
        "prefill.block_size": blocks[0],
        "prefill.max_batch_tokens": _MAX_BATCH_TOKENS,
        "prefill.num_blocks": 4096 // blocks[0],
        "decode.tensor_parallel": decode[0],
        "decode.pipeline_parallel": decode[1],
        "decode.block_size": blocks[1],
        "decode.max_batch_tokens": _MAX_BATCH_TOKENS,
        "decode.max_batch_size": 32,
        "decode.num_blocks": 8192 // blocks[1],
        "transfer.transport": "gloo",
        "transfer.one_message_below_tokens": 20,
        "transfer.layers_per_group": 1,
    }
    async with ranks(model, settings) as started:
        router = await started.router()
        handed_over = await _run(router, requests("far"), remote=True)
        assert _tokens(handed_over) == expected(model)
        assert set(router.prefill_instances.values()) == {"prefill-0"}
        assert len(router.prefill_instances) == len(handed_over)
        if prefill == decode:
            alone = await _run(router, requests("near"), remote=False)
            assert _tokens(alone) == expected(model)
            assert _logprobs(alone) == _logprobs(handed_over)
        await router.wait_until_settled()
        await router.close()


async def _run(router: RankRouter, sent: list[EngineRequest], *, remote: bool) -> list[list[RequestOutput]]:
    calls = []
    for request in sent:
        await router.submit(request, remote=remote)
        if remote:
            calls.append(asyncio.ensure_future(_reply(router.start_prefill(request))))
    await router.collect(*(request.request_id for request in sent))
    await asyncio.gather(*calls)
    return [router.outputs[request.request_id] for request in sent]


async def _reply(call: Any) -> Any:
    return await call


def _tokens(outputs: list[list[RequestOutput]]) -> list[list[int]]:
    return [[token for output in request for token in output.token_ids] for request in outputs]


def _logprobs(outputs: list[list[RequestOutput]]) -> list[Any]:
    return [[output.logprobs for output in request] for request in outputs]
