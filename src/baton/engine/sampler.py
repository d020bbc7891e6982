"""Draws tokens: stateless Gumbel-max, so that nothing but (logits, parameters, seed, position) decides.

A token is `argmax(logits / temperature + g)` over the kept tokens, where g is Gumbel noise that is a counter-based hash
of (seed, position, token id) (`kernels.ops.gumbel_noise`); that draws exactly from softmax(logits / temperature)
(Gumbel-max trick; Maddison et al. 2014, arXiv 1411.0030). No generator object: batch slot, restart and migration change
nothing. `position` counts from the prompt's start. Log-probabilities are of the unprocessed logits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.logits import LogitsProcessor, keep_mask
from baton.engine.request import SamplingParams, TokenLogprobs
from baton.kernels import ops

__all__ = ["GREEDY_TEMPERATURE", "Sampled", "SamplerRow", "sample", "token_logprobs"]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""


@dataclass(frozen=True, slots=True)
class SamplerRow:
    """What decides the next token of one sequence.

    Attributes:
        output_token_ids: output so far.
        position: index of the token to be drawn, from the prompt's start.
        processor: None where it is trivial.
    """

    sampling: SamplingParams
    output_token_ids: Sequence[int]
    position: int
    processor: LogitsProcessor | None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A drawn token, or `error` where no token could be drawn."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str = ""


def sample(logits: Tensor, rows: Sequence[SamplerRow]) -> list[Sampled]:
    """Draws one token per row.

    Args:
        logits: fp32 [len(rows), vocab_size], unprocessed; not changed.
        rows: one per row of `logits`.
    """
    assert logits.dtype == torch.float32
    assert logits.shape[0] == len(rows)
    raw: npt.NDArray[np.float32] = logits.numpy(force=True)
    lse = _lse_where(logits, [row.sampling.logprobs is not None for row in rows])
    noise = _noise_where(rows, raw.shape[1])
    greedy = raw.argmax(axis=1)
    sampled = []
    for index, row in enumerate(rows):
        token_id, error = _draw(raw[index], row, noise.get(index), int(greedy[index]))
        logprobs = None
        if row.sampling.logprobs is not None and not error:
            logprobs = token_logprobs(raw[index], lse[index], token_id, row.sampling.logprobs)
        sampled.append(Sampled(token_id, logprobs, error))
    return sampled


def token_logprobs(row: npt.NDArray[np.float32], lse: np.float32, token_id: int, num_top: int) -> TokenLogprobs:
    """Log-probability and rank of `token_id`, and the `num_top` most likely tokens, from raw logits and their lse."""
    chosen = row[token_id]
    top: tuple[tuple[int, float], ...] = ()
    if num_top > 0:
        num_top = min(num_top, row.size)
        threshold = np.partition(row, row.size - num_top)[row.size - num_top]
        ids = np.flatnonzero(row >= threshold)
        ids = ids[np.argsort(-row[ids], kind="stable")][:num_top]
        top = tuple((int(i), float(row[i] - lse)) for i in ids)
    return TokenLogprobs(token_id, float(chosen - lse), int((row > chosen).sum()) + 1, top)


def _draw(
    raw: npt.NDArray[np.float32], row: SamplerRow, noise: npt.NDArray[np.float32] | None, greedy: int
) -> tuple[int, str]:
    sampling = row.sampling
    if not np.isfinite(raw[greedy]):  # argmax finds NaN before any number
        return 0, "the model's output is not a number; the request cannot be continued"
    if row.processor is None and noise is None:
        return greedy, ""
    scores = raw
    if row.processor is not None:
        scores = raw.copy()
        row.processor.apply(scores, row.output_token_ids)
        if not np.isfinite(scores.max()):
            return 0, "allowed_token_ids, bad_words and logit_bias together leave no token that may be sampled"
        if noise is None:
            return int(scores.argmax()), ""
    assert noise is not None
    scores = scores / np.float32(sampling.temperature)
    noise = noise + scores
    if sampling.min_p > 0.0 or sampling.top_k > 0 or sampling.top_p < 1.0:
        keep = keep_mask(scores, min_p=sampling.min_p, top_k=sampling.top_k, top_p=sampling.top_p)
        noise[~keep] = -np.inf
    return int(noise.argmax()), ""


def _lse_where(logits: Tensor, wanted: list[bool]) -> npt.NDArray[np.float32]:
    if not any(wanted):
        return np.zeros(len(wanted), dtype=np.float32)
    lse: npt.NDArray[np.float32] = ops.logits_lse(logits).numpy(force=True)
    return lse


def _noise_where(rows: Sequence[SamplerRow], vocab_size: int) -> dict[int, npt.NDArray[np.float32]]:
    drawn = [i for i, row in enumerate(rows) if row.sampling.temperature >= GREEDY_TEMPERATURE]
    if not drawn:
        return {}
    seeds = np.array([rows[i].sampling.seed & 0xFFFFFFFFFFFFFFFF for i in drawn], dtype=np.uint64).view(np.int64)
    positions = np.array([rows[i].position for i in drawn], dtype=np.int64)
    noise = ops.gumbel_noise(torch.from_numpy(seeds), torch.from_numpy(positions), vocab_size).numpy(force=True)
    return dict(zip(drawn, noise, strict=True))
