"""Instances of several ranks: any pair of layouts hands over, tokens stay, blocks settle, a lost rank ends its own."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from harness import request
from rank_harness import ranks
from tests.engine.model_factory import VOCAB_SIZE, write_checkpoint

from baton.engine.engine import Engine
from baton.engine.request import EngineRequest
from baton.engine.runner import ModelRunner
from baton.kernels import ops

_NUM_TOKENS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama-gqa-bias")


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The reference kernels: at warm-up ranks switch back ends, which is one setting for all ranks of this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with ops.use_backend("reference"):
        yield
    torch.set_num_threads(before)


def requests(count: int = 6) -> list[EngineRequest]:
    rng = random.Random(5)
    prompts = [
        [rng.randrange(VOCAB_SIZE - 70) for _ in range(rng.choice([1, 7, 16, 33, 64, 150]))] for _ in range(count)
    ]
    return [request(f"r{index}", prompt, _NUM_TOKENS, ignore_eos=True) for index, prompt in enumerate(prompts)]


def alone(model: Path) -> list[list[int]]:
    """The single rank's tokens."""
    runner = ModelRunner(model, num_blocks=96, max_model_len=256, max_batch_tokens=256)
    engine = Engine(runner, max_batch_tokens=256, max_batch_size=16)
    tokens: dict[str, list[int]] = {}
    for each in requests():
        assert not engine.add(each)
    while engine.has_work:
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return [tokens[each.request_id] for each in requests()]


@pytest.mark.parametrize(
    ("prefill", "decode", "settings"),
    [
        ((2, 1), (1, 1), {}),
        ((1, 1), (1, 2), {"prefill.block_size": 8}),
        ((1, 2), (2, 1), {"decode.block_size": 32, "transfer.transport": "gloo"}),
        ((2, 2), (2, 2), {}),
        ((1, 1), (4, 1), {"transfer.one_message_below_tokens": 0, "transfer.layers_per_group": 1}),
    ],
)
async def test_any_layout_hands_over_to_any(
    model: Path, prefill: tuple[int, int], decode: tuple[int, int], settings: dict[str, Any]
) -> None:
    layout = {
        "prefill.tensor_parallel": prefill[0],
        "prefill.pipeline_parallel": prefill[1],
        "decode.tensor_parallel": decode[0],
        "decode.pipeline_parallel": decode[1],
        "prefill.max_batch_tokens": 64,
    }
    async with ranks(model, {**layout, **settings}) as started:
        status = started.registry.statuses["decode-0"]
        assert [rank.rank for rank in status.ranks] == list(range(decode[0] * decode[1]))
        router = await started.router()
        sent = requests()
        calls = []
        for each in sent:
            await router.submit(each, remote=True)
            calls.append(asyncio.ensure_future(_reply(router.start_prefill(each))))
        tokens = await router.collect(*(each.request_id for each in sent))
        replies = await asyncio.gather(*calls)
        assert tokens == alone(model)
        assert set(router.prefill_instances.values()) == {"prefill-0"}
        assert all(reply.shipped_bytes > 0 for reply in replies)
        await router.wait_until_settled()
        await router.close()


async def _reply(call: Any) -> Any:
    return await call
