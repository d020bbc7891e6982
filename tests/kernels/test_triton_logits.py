"""What requests do to their logits, as tables: the bits of the host's processor, on every backend that has it."""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from baton.engine.logits import LogitsProcessor
from baton.engine.request import SamplingParams
from baton.kernels import ops

VOCAB = 1100
EOS = (3, 1099)


@pytest.fixture(params=["triton", "reference"])
def device(request: pytest.FixtureRequest, triton_device: torch.device) -> Iterator[torch.device]:
    """Where the tables lie, with the backend active."""
    with ops.use_backend(request.param):
        yield triton_device


REQUESTS = [
    SamplingParams(max_tokens=9),
    SamplingParams(max_tokens=9, allowed_token_ids=(0, 5, 31, 32, 63, 1099)),
    SamplingParams(max_tokens=9, min_tokens=3, stop_token_ids=(7,)),
    SamplingParams(max_tokens=9, min_tokens=1, stop_token_ids=(7,)),
    SamplingParams(max_tokens=9, logit_bias=((4, -100.0), (1024, 2.5), (3, 0.1))),
    SamplingParams(max_tokens=9, repetition_penalty=1.3),
    SamplingParams(max_tokens=9, frequency_penalty=0.7, presence_penalty=-0.2),
    SamplingParams(
        max_tokens=9,
        allowed_token_ids=tuple(range(3, 900)),
        min_tokens=4,
        logit_bias=((8, 1.7),),
        repetition_penalty=0.8,
        frequency_penalty=0.3,
        presence_penalty=0.1,
    ),
]
PROMPT = (1, 8, 8, 500, 1098)
OUTPUT = (8, 2, 8)


def tables_of(requests: list[SamplingParams], device: torch.device, output: tuple[int, ...]) -> ops.LogitsTables:
    """Request i in slot 2 * i + 1, over what other requests left there."""
    tables = ops.LogitsTables.empty(2 * len(requests) + 1, VOCAB, max_bias=4, max_ends=3, device=device)
    for index, sampling in enumerate(requests):
        slot = 2 * index + 1
        tables.write(slot, allowed_token_ids=(9,), logit_bias=((1, 1.0),) * 4, end_ids=EOS, prompt_token_ids=range(99))
        tables.write(
            slot,
            allowed_token_ids=sampling.allowed_token_ids,
            logit_bias=sampling.logit_bias,
            end_ids=(*sampling.stop_token_ids, *EOS),
            min_tokens=sampling.min_tokens,
            repetition_penalty=sampling.repetition_penalty,
            frequency_penalty=sampling.frequency_penalty,
            presence_penalty=sampling.presence_penalty,
            prompt_token_ids=PROMPT,
            output_token_ids=output,
        )
    return tables


@pytest.mark.parametrize("counted", [False, True], ids=["written", "counted"])
def test_equals_the_processor_of_the_host(device: torch.device, counted: bool) -> None:
    """Whether the output was there from the start, or its tokens were counted one by one."""
    tables = tables_of(REQUESTS, device, () if counted else OUTPUT)
    slots = torch.arange(len(REQUESTS), dtype=torch.int32, device=device) * 2 + 1
    for token in OUTPUT if counted else ():
        ops.count_tokens(tables, slots, torch.full((len(REQUESTS),), token, device=device))
    raw = 3 * torch.randn(len(REQUESTS) + 1, VOCAB)
    raw[:, 8] = 0.0
    raw[:, 9] = -math.inf
    expected = raw.clone()
    for row, sampling in zip(expected.numpy(), REQUESTS, strict=False):
        LogitsProcessor(sampling, PROMPT, EOS, VOCAB).apply(row, OUTPUT)
    logits = raw.to(device)
    ops.process_logits(logits, torch.cat((slots, slots.new_tensor([-1]))), tables)
    assert np.array_equal(logits.cpu().numpy(), expected.numpy())


def test_padding_counts_nothing(device: torch.device) -> None:
    tables = tables_of(REQUESTS[:2], device, OUTPUT)
    before = tables.counts.clone(), tables.num_outputs.clone()
    slots = torch.tensor([-1, 3, -1], dtype=torch.int32, device=device)
    ops.count_tokens(tables, slots, torch.tensor([5, ops.NOT_A_NUMBER, ops.NOT_A_NUMBER], device=device))
    assert torch.equal(tables.counts, before[0])
    assert torch.equal(tables.num_outputs, before[1])
    ops.count_tokens(tables, slots[:0], torch.zeros(0, dtype=torch.int64, device=device))


def test_requests_that_do_not_fit_are_refused() -> None:
    tables = ops.LogitsTables.empty(1, 50, max_bias=2, max_ends=1)
    with pytest.raises(ValueError, match="logit_bias has 3 entries, the tables have room for 2"):
        tables.write(0, logit_bias=((1, 1.0), (2, 1.0), (3, 1.0)))
    with pytest.raises(ValueError, match="end_ids has 2"):
        tables.write(0, end_ids=(1, 2))
    with pytest.raises(ValueError, match="tables are for 50 tokens"):
        ops.process_logits(torch.zeros(1, 51), torch.zeros(1, dtype=torch.int32), tables)


@pytest.mark.parametrize("vocab", [1, 7, 1023, 5000])
def test_lse(triton_backend: torch.device, vocab: int) -> None:
    logits = 10 * torch.randn(5, vocab).to(triton_backend)
    logits[1, vocab // 2] = -math.inf
    logits[2] += 1e4
    expected = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(ops.logits_lse(logits).double(), expected, atol=2e-6, rtol=1e-6)
    out = torch.empty(5, device=triton_backend)
    assert ops.logits_lse(logits[:, :1], out=out) is out
    assert torch.equal(out, logits[:, 0])


def test_lse_of_nothing(triton_backend: torch.device) -> None:
    nothing = torch.full((2, 40), -math.inf, device=triton_backend)
    assert ops.logits_lse(nothing).tolist() == [-math.inf, -math.inf]
    assert ops.logits_lse(nothing[:0]).shape == (0,)
