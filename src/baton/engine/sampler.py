"""Draws tokens: stateless Gumbel-max, so that nothing but (logits, parameters, seed, position) decides.

A token is `argmax(logits / temperature + g)` over the kept tokens, where g is Gumbel noise that is a counter-based hash
of (seed, position, token id) (`kernels.ops.draw_tokens`); that draws exactly from softmax(logits / temperature)
(Gumbel-max trick; Maddison et al. 2014, arXiv 1411.0030). No generator object: batch slot, restart and migration change
nothing. `position` counts from the prompt's start. Log-probabilities are of the unprocessed logits.

All rows of a step are drawn in one call; only those with penalties or masks are copied first, and only those that want
log-probabilities are looked at again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.logits import LogitsProcessor
from baton.engine.request import SamplingParams, TokenLogprobs
from baton.kernels import ops

__all__ = ["GREEDY_TEMPERATURE", "RequestSampler", "Sampled", "SamplerRow", "draw_plain", "sample", "token_logprobs"]

GREEDY_TEMPERATURE = 1e-5
"""Temperatures below this are greedy."""

_GREEDY = ops.pack_sampling(seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)
_NOT_A_NUMBER = "the model's output is not a number; the request cannot be continued"
_NOTHING_LEFT = "allowed_token_ids, bad_words and logit_bias together leave no token that may be sampled"

Floats = npt.NDArray[np.float32]


class RequestSampler:
    """What stays the same over all tokens of a request.

    Args:
        processor: of this request; one that is trivial is not kept.

    Attributes:
        packed: for `ops.draw_tokens`.
        is_plain: `packed` says all: neither the output so far nor log-probabilities are looked at.
    """

    __slots__ = ("is_plain", "num_logprobs", "packed", "processor")

    def __init__(self, sampling: SamplingParams, processor: LogitsProcessor) -> None:
        self.processor = None if processor.is_trivial else processor
        self.num_logprobs = sampling.logprobs
        self.packed = ops.pack_sampling(
            seed=sampling.seed,
            temperature=sampling.temperature if sampling.temperature >= GREEDY_TEMPERATURE else 0.0,
            top_k=sampling.top_k,
            top_p=sampling.top_p,
            min_p=sampling.min_p,
        )
        self.is_plain = self.processor is None and self.num_logprobs is None


@dataclass(slots=True)
class SamplerRow:
    """What decides the next token of one sequence.

    Attributes:
        position: index of the token to be drawn, from the prompt's start.
        output_token_ids: output so far; not read without a processor.
    """

    sampler: RequestSampler
    position: int
    output_token_ids: Sequence[int] = ()


class Sampled(NamedTuple):
    """A drawn token, or `error` where no token could be drawn."""

    token_id: int
    logprobs: TokenLogprobs | None = None
    error: str = ""

    @classmethod
    def of(cls, drawn: int) -> Sampled:
        """What `ops.draw_tokens` says of one row."""
        return cls(drawn) if drawn >= 0 else cls(0, None, _NOT_A_NUMBER)


def sample(logits: Tensor, rows: Sequence[SamplerRow], row_ids: Sequence[int] | None = None) -> list[Sampled]:
    """Draws one token per row.

    Args:
        logits: fp32 [R, vocab_size], unprocessed; not changed.
        rows: one per token to be drawn.
        row_ids: where in `logits` each of them finds its own; None: one after the other.
    """
    assert logits.dtype == torch.float32
    where = np.arange(len(rows)) if row_ids is None else np.array(row_ids, dtype=np.int64)
    assert len(where) == len(rows)
    # Rows with a processor are only looked at for NaN here.
    packed = b"".join([row.sampler.packed if row.sampler.processor is None else _GREEDY for row in rows])
    positions = np.array([row.position for row in rows], dtype=np.int64)
    plain = ops.draw_tokens(logits, where, packed, positions)
    sampled = [Sampled.of(token) for token in plain.tolist()]
    processed = [i for i, row in enumerate(rows) if row.sampler.processor is not None and not sampled[i].error]
    if processed:
        _draw_processed(logits, where, rows, processed, sampled)
    told = [i for i, row in enumerate(rows) if row.sampler.num_logprobs is not None and not sampled[i].error]
    if told:
        _add_logprobs(logits, where, rows, told, sampled)
    return sampled


def draw_plain(
    logits: Tensor, samplers: Sequence[RequestSampler], positions: Sequence[int], row_ids: Sequence[int]
) -> list[int]:
    """`sample` for rows whose samplers are all plain: token ids, for `Sampled.of`."""
    packed = b"".join([sampler.packed for sampler in samplers])
    where, at = np.array(row_ids, dtype=np.int64), np.array(positions, dtype=np.int64)
    drawn: list[int] = ops.draw_tokens(logits, where, packed, at).tolist()
    return drawn


def _draw_processed(
    logits: Tensor,
    where: npt.NDArray[np.int64],
    rows: Sequence[SamplerRow],
    processed: list[int],
    sampled: list[Sampled],
) -> None:
    scores: Floats = logits.numpy(force=True)[where[processed]]
    for index, at in enumerate(processed):
        processor = rows[at].sampler.processor
        assert processor is not None
        processor.apply(scores[index], rows[at].output_token_ids)
    packed = b"".join([rows[at].sampler.packed for at in processed])
    positions = np.array([rows[at].position for at in processed], dtype=np.int64)
    drawn = ops.draw_tokens(torch.from_numpy(scores), np.arange(len(processed)), packed, positions)
    for at, token in zip(processed, drawn.tolist(), strict=True):
        sampled[at] = Sampled(token) if token >= 0 else Sampled(0, None, _NOTHING_LEFT)


def _add_logprobs(
    logits: Tensor, where: npt.NDArray[np.int64], rows: Sequence[SamplerRow], told: list[int], sampled: list[Sampled]
) -> None:
    # Not torch's indexing, which would start a team of threads.
    raw: Floats = logits.numpy(force=True)[where[told]]
    lse: Floats = ops.logits_lse(torch.from_numpy(raw)).numpy()
    for index, at in enumerate(told):
        num_top = rows[at].sampler.num_logprobs
        assert num_top is not None
        token_id = sampled[at].token_id
        sampled[at] = Sampled(token_id, token_logprobs(raw[index], lse[index], token_id, num_top))


def token_logprobs(row: Floats, lse: np.float32, token_id: int, num_top: int) -> TokenLogprobs:
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
