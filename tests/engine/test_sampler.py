"""The sampler draws from the right distribution, in the documented order, and from nothing but its inputs."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from baton.engine.logits import LogitsProcessor
from baton.engine.request import SamplingParams
from baton.engine.sampler import RequestSampler, SamplerRow, sample
from baton.kernels.reference.sampling import keep_mask

VOCAB = 12
LOGITS = torch.tensor([2.0, 1.5, 1.0, 0.5, 0.25, 0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0])


def row(
    position: int = 5, output: list[int] | None = None, prompt: tuple[int, ...] = (1, 2), **options: object
) -> SamplerRow:
    sampling = SamplingParams(max_tokens=99, **options)  # type: ignore[arg-type]
    processor = LogitsProcessor(sampling, prompt, [0], VOCAB)
    return SamplerRow(RequestSampler(sampling, processor), position, output or [])


def draws(logits: torch.Tensor, count: int, **options: object) -> np.ndarray:
    """Histogram of `count` draws at positions 0..count-1."""
    histogram = np.zeros(VOCAB, dtype=np.int64)
    for begin in range(0, count, 500):
        rows = [row(position=begin + i, **options) for i in range(500)]
        for drawn in sample(logits.expand(500, VOCAB).contiguous(), rows):
            histogram[drawn.token_id] += 1
    return histogram


def chi_squared(histogram: np.ndarray, probabilities: np.ndarray) -> float:
    expected = probabilities * histogram.sum()
    used = expected > 0
    assert histogram[~used].sum() == 0
    return float(((histogram[used] - expected[used]) ** 2 / expected[used]).sum())


def softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return np.asarray(weights / weights.sum())


# The 99.9 % quantile of chi-squared with up to 11 degrees of freedom is 31.3; seeds are fixed, so this never flickers.
BOUND = 31.3


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_plain_sampling_follows_the_softmax(temperature: float, seed: int) -> None:
    histogram = draws(LOGITS, 20_000, temperature=temperature, seed=seed)
    assert chi_squared(histogram, softmax(LOGITS.numpy() / temperature)) < BOUND


def test_the_bound_would_catch_a_wrong_distribution() -> None:
    histogram = draws(LOGITS, 20_000, temperature=1.0, seed=0)
    assert chi_squared(histogram, softmax(LOGITS.numpy() / 1.1)) > BOUND


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"top_k": 3}, 3),
        ({"top_k": 1}, 1),
        ({"top_p": 0.5}, 2),  # 0.364 + 0.221 reaches it
        ({"top_p": 1e-9}, 1),
        ({"min_p": 0.3}, 3),  # exp(-1.0) = 0.37 stays, exp(-1.5) = 0.22 goes
        ({"top_k": 4, "top_p": 0.9}, 4),
        ({"top_k": 100}, VOCAB),
    ],
)
def test_truncated_sampling_follows_the_renormalised_rest(options: dict[str, float], kept: int) -> None:
    histogram = draws(LOGITS, 10_000, seed=3, **options)
    probabilities = softmax(LOGITS.numpy().astype(np.float64))
    probabilities[kept:] = 0
    assert chi_squared(histogram, probabilities / probabilities.sum()) < BOUND


def test_consecutive_tokens_are_independent() -> None:
    pairs = np.zeros((2, 2))
    logits = torch.zeros(1, VOCAB)
    rows = [row(position=i, seed=11) for i in range(8001)]
    tokens = [drawn.token_id % 2 for drawn in sample(logits.expand(len(rows), VOCAB).contiguous(), rows)]
    for left, right in itertools.pairwise(tokens):
        pairs[left, right] += 1
    expected = pairs.sum(1, keepdims=True) * pairs.sum(0, keepdims=True) / pairs.sum()
    assert ((pairs - expected) ** 2 / expected).sum() < 10.8


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**64 - 1), st.integers(0, 10_000), st.integers(0, 6), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_row_does_not_see_its_batch(seed: int, position: int, place: int, temperature: float) -> None:
    alone = row(position, seed=seed, temperature=temperature, top_p=0.9, logprobs=3)
    others = [row(i, seed=i, temperature=0.7) for i in range(6)]
    batch = [*others[:place], alone, *others[place:]]
    generator = torch.Generator().manual_seed(seed % 1000)
    logits = torch.randn(7, VOCAB, generator=generator)
    assert sample(logits, batch)[place] == sample(logits[place : place + 1], [alone])[0]


def test_greedy_takes_the_most_likely_and_ties_go_to_the_smallest_id() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0] + [0.0] * 8])
    assert sample(logits, [row(temperature=0.0)])[0].token_id == 1


def test_logprobs_are_of_the_unprocessed_logits() -> None:
    biased = row(temperature=0.0, logit_bias=((11, 100.0),), logprobs=2)
    drawn = sample(LOGITS[None], [biased])[0]
    reference = torch.log_softmax(LOGITS.double(), 0)
    assert drawn.token_id == 11
    assert drawn.logprobs is not None
    assert drawn.logprobs.rank == 12
    assert drawn.logprobs.logprob == pytest.approx(float(reference[11]), abs=1e-5)
    assert [i for i, _ in drawn.logprobs.top] == [0, 1]
    assert drawn.logprobs.top[0][1] == pytest.approx(float(reference[0]), abs=1e-5)


def processed(output: list[int], **options: object) -> np.ndarray:
    changed = LOGITS.numpy().copy()
    sampler_row = row(output=output, **options)
    assert sampler_row.sampler.processor is not None
    sampler_row.sampler.processor.apply(changed, output)
    return changed


def test_penalties() -> None:
    output = [3, 3, 9]
    repeated = processed(output, repetition_penalty=2.0)
    for token_id, logit in enumerate(LOGITS.tolist()):
        seen = token_id in (1, 2, 3, 9)
        assert repeated[token_id] == pytest.approx((logit / 2 if logit > 0 else logit * 2) if seen else logit)
    frequent = processed(output, frequency_penalty=0.5, presence_penalty=0.25)
    assert frequent[3] == pytest.approx(0.5 - 2 * 0.5 - 0.25)
    assert frequent[9] == pytest.approx(-2.0 - 0.5 - 0.25)
    assert frequent[1] == LOGITS[1]  # the prompt does not count


def test_masks_and_bias() -> None:
    assert np.isneginf(processed([], allowed_token_ids=(2, 3))).sum() == VOCAB - 2
    assert np.isneginf(processed([], bad_words_ids=((4,), (5, 6))))[[4, 6]].tolist() == [True, False]
    assert np.isneginf(processed([1, 5], bad_words_ids=((5, 6),)))[6]
    early = processed([7], min_tokens=2, stop_token_ids=(8,))
    assert np.isneginf(early[[0, 8]]).all()
    assert not np.isneginf(processed([7, 7], min_tokens=2, stop_token_ids=(8,))[[0, 8]]).any()
    assert not np.isneginf(processed([7], min_tokens=2, ignore_eos=True, stop_token_ids=(8,))[0])
    assert processed([], logit_bias=((2, -1.5),))[2] == pytest.approx(-0.5)


def test_a_processor_built_anew_does_the_same() -> None:
    sampling = SamplingParams(max_tokens=9, repetition_penalty=1.3, frequency_penalty=0.1, presence_penalty=0.2)
    grown = LogitsProcessor(sampling, (1, 2), [0], VOCAB)
    output: list[int] = []
    for token_id in (3, 5, 3, 7):
        output.append(token_id)
        left, right = LOGITS.numpy().copy(), LOGITS.numpy().copy()
        grown.apply(left, output)
        LogitsProcessor(sampling, (1, 2), [0], VOCAB).apply(right, output)
        assert (left == right).all()


@settings(max_examples=100, deadline=None)
@example([-5.8e-29, 0.0], 0, 0.25, 0.0)  # one weight, two logits
@given(
    st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=40),
    st.integers(0, 45),
    st.floats(0.001, 1.0),
    st.floats(0.0, 1.0),
)
def test_kept_tokens_are_the_most_likely_ones(values: list[float], top_k: int, top_p: float, min_p: float) -> None:
    logits = np.array(values, dtype=np.float32)
    log_min_p = math.log(min_p) if min_p else -math.inf
    keep = keep_mask(logits, log_min_p=log_min_p, top_k=top_k, top_p=top_p)
    assert keep[logits.argmax()]
    if keep.any() and not keep.all():
        assert logits[keep].min() >= logits[~keep].max()
    if top_k and min_p == 0 and top_p == 1.0:
        assert keep.sum() >= min(top_k, len(values))
    probabilities = softmax(logits.astype(np.float64))
    if top_k == 0 and min_p == 0.0:
        assert probabilities[keep].sum() >= top_p - 1e-9
        if keep.sum() > 1:
            assert probabilities[keep].sum() - probabilities[keep].min() < top_p + 1e-9
