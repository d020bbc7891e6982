"""The engine around a fake model whose tokens depend on every page of its context: any misplaced page changes them.

Every test runs twice: one step at a time, and with steps launched ahead of each other as on a GPU.
"""

from __future__ import annotations

import random
import sys
from typing import Any

import numpy as np
import pytest
import torch

from baton.engine.engine import Engine
from baton.engine.fake import FakeEngine, fake_next_token
from baton.engine.pages import KvPages
from baton.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams


def expected(prompt: list[int], count: int, vocab_size: int = 512) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(fake_next_token(tokens, vocab_size))
    return tokens[len(prompt) :]


def request(name: str, prompt: list[int], max_tokens: int, **options: object) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)  # type: ignore[arg-type]
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


_OVERLAP = False


@pytest.fixture(autouse=True, params=[False, True], ids=["one at a time", "launched ahead"])
def _mode(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "_OVERLAP", request.param)


def make(**options: Any) -> Engine:
    return FakeEngine(**{"max_batch_tokens": 64, "max_batch_size": 8, "overlap": _OVERLAP, **options})


def run(engine: Engine, limit: int = 2000) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(limit):
        if not engine.has_work:
            break
        for output in engine.step().outputs:
            outputs.setdefault(output.request_id, []).append(output)
        engine.pool.check()
    return outputs


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [token_id for output in outputs for token_id in output.token_ids]


@pytest.mark.parametrize(("num_blocks", "chunk"), [(200, 64), (200, 9), (16, 64), (12, 13)])
def test_tokens_do_not_depend_on_chunks_batches_or_preemption(num_blocks: int, chunk: int) -> None:
    generator = random.Random(5)
    engine = make(num_blocks=num_blocks, block_size=4, max_batch_tokens=chunk, max_model_len=48)
    prompts = {f"r{i}": [generator.randrange(512) for _ in range(generator.randrange(1, 30))] for i in range(24)}
    for name, prompt in prompts.items():
        assert engine.add(request(name, prompt, 12)) == ""
    outputs = run(engine)
    for name, prompt in prompts.items():
        assert tokens_of(outputs[name]) == expected(prompt, 12)
        assert outputs[name][-1].finish_reason is FinishReason.LENGTH
    if num_blocks <= 16:
        assert engine.scheduler.num_preemptions > 0
    counts = engine.pool.counts()
    assert counts.owned == 0
    assert counts.free + counts.cached == counts.total


def test_pages_travel_between_engines_of_other_block_sizes() -> None:
    source, target = make(block_size=8, num_blocks=64), make(block_size=4, num_blocks=64)
    prompt = list(range(3, 40))
    source.add(request("a", prompt, 5), prefill_only=True)
    first = tokens_of(run(source)["a"])
    assert len(first) == 1
    target.add(request("a", prompt, 5), remote_prefill=True)
    reserved = target.step().plan.reserved[0]
    held = source.scheduler.get(("a", 0))
    assert held is not None
    for layers, tokens in (((0, 3), (0, 20)), ((3, 4), (0, 20)), ((0, 4), (20, 37))):
        elements = (layers[1] - layers[0]) * 2 * (tokens[1] - tokens[0]) * 2
        payload = torch.empty(elements * 4, dtype=torch.uint8)
        source.pages.gather(held.block_ids, layers, tokens, payload)
        target.pages.scatter(reserved.block_ids, layers, tokens, payload)
    output = target.attach(("a", 0), first[0], None, 0)
    assert output is not None
    assert first + tokens_of(run(target)["a"]) == expected(prompt, 5)
    source.release(("a", 0))
    assert source.pool.counts().owned == target.pool.counts().owned == 0


def test_pages_of_some_heads_are_a_part_of_all() -> None:
    shape = (8, 4, 2, 3, 4, 2)
    kv = torch.arange(1.0, 1 + np.prod(shape)).view(shape)
    pool = KvPages(kv, 4)
    ids, layers, tokens, num_heads = [5, 2], (1, 3), (2, 7), kv.shape[3]
    everything, sums = torch.empty(2, 2, num_heads, 5, kv.shape[5]), []
    pool.gather(ids, layers, tokens, everything.view(-1).view(torch.uint8))
    assert torch.equal(everything[0, 1, :, 2], kv[2, 1, 1, :, 0])
    for head in range(num_heads):
        one = torch.empty(2, 2, 1, 5, kv.shape[5])
        sums.append(pool.gather(ids, layers, tokens, one.view(-1).view(torch.uint8), heads=(head, head + 1)))
        assert torch.equal(one, everything[:, :, head : head + 1])
    before = kv.clone()
    kv.zero_()
    for head in range(num_heads):
        part = everything[:, :, head : head + 1].contiguous().view(-1).view(torch.uint8)
        assert pool.scatter(ids, layers, tokens, part, heads=(head, head + 1)) == sums[head]
    assert torch.equal(kv[5, 1:3, :, :, 2:], before[5, 1:3, :, :, 2:])
    assert torch.equal(kv[2, 1:3, :, :, :3], before[2, 1:3, :, :, :3])
    assert kv.count_nonzero() == everything.count_nonzero()


def test_prompt_logprobs_cover_every_prompt_token_but_the_first() -> None:
    engine = make(max_batch_tokens=5, max_batch_size=4)
    prompt = list(range(1, 18))
    engine.add(request("a", prompt, 2, prompt_logprobs=2, logprobs=1))
    first = run(engine)["a"][0]
    assert first.prompt_logprobs is not None
    assert first.prompt_logprobs[0] is None
    assert [entry.token_id for entry in first.prompt_logprobs[1:] if entry] == prompt[1:]
    for position, entry in enumerate(first.prompt_logprobs[1:], start=1):
        assert entry is not None
        assert len(entry.top) == 2
        likely = fake_next_token(prompt[:position], 512)
        assert entry.top[0][0] == likely
        assert (entry.rank == 1) == (entry.token_id == likely)
    assert first.logprobs[0].rank == 1


def test_requests_that_cannot_run_are_refused_with_the_numbers() -> None:
    engine = make(max_model_len=32)
    assert "32 tokens; 1 to 31 fit" in engine.add(request("a", [1] * 32, 1))
    assert "vocabulary of 512" in engine.add(request("b", [512], 1))
    assert engine.add(request("c", [1], 1)) == ""
    assert "already running" in engine.add(request("c", [1], 1))


def test_a_mask_over_everything_is_an_error_of_that_request_alone() -> None:
    engine = make()
    engine.add(request("bad", [1, 2], 3, allowed_token_ids=(5,), bad_words_ids=((5,),)))
    engine.add(request("good", [1, 2], 3))
    outputs = run(engine)
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert "no token" in outputs["bad"][-1].error
    assert tokens_of(outputs["good"]) == expected([1, 2], 3)
    assert engine.pool.counts().owned == 0


def test_not_a_number_is_an_error_and_never_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make()
    engine.add(request("a", [1, 2], 3))
    monkeypatch.setattr(engine.runner, "forward", lambda *_: torch.full((1, 512), float("nan")))
    output = engine.step().outputs[0]
    assert output.finish_reason is FinishReason.ERROR
    assert "not a number" in output.error
    assert np.isnan(engine.runner.kv.numpy()).all()
