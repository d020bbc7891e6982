"""What a request does to its logits before a token is drawn: one processor per sequence, numpy, row by row.

Order (as in vLLM's sampler, so that users carry their expectations over):
    allowed_token_ids -> bad_words -> min_tokens -> logit_bias -> repetition, frequency, presence penalties
    -> greedy argmax, or temperature -> min_p -> top_k -> top_p -> draw (`engine/sampler.py`).

A processor sees only (sampling parameters, prompt, output so far), so one built anew over the same tokens (after a
preemption or a worker's death) does the same. Rows are handled one at a time on arrays of one shape: what the other
rows of a batch hold cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from baton.engine.request import SamplingParams

__all__ = ["LogitsProcessor", "keep_mask"]

Floats = npt.NDArray[np.float32]


class LogitsProcessor:
    """Masks, biases and penalties of one sequence.

    Args:
        sampling: the request's parameters; ids are within the vocabulary.
        prompt_token_ids: for the repetition penalty.
        eos_token_ids: masked, with the request's stop tokens, until `min_tokens` are out.
        vocab_size: entries of a row.
    """

    def __init__(
        self, sampling: SamplingParams, prompt_token_ids: Sequence[int], eos_token_ids: Iterable[int], vocab_size: int
    ) -> None:
        self._sampling = sampling
        self._vocab_size = vocab_size
        self._forbidden: npt.NDArray[np.bool_] | None = None
        if sampling.allowed_token_ids is not None:
            self._forbidden = np.ones(vocab_size, dtype=np.bool_)
            self._forbidden[list(sampling.allowed_token_ids)] = False
        ends = set(sampling.stop_token_ids) | (set() if sampling.ignore_eos else set(eos_token_ids))
        self._ends = np.array(sorted(ends), dtype=np.int64)
        self._bias_ids = np.array([i for i, _ in sampling.logit_bias], dtype=np.int64)
        self._bias = np.array([b for _, b in sampling.logit_bias], dtype=np.float32)
        self._counts: npt.NDArray[np.int32] | None = None
        self._seen: npt.NDArray[np.bool_] | None = None
        self._num_counted = 0
        if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
            self._counts = np.zeros(vocab_size, dtype=np.int32)
            self._seen = np.zeros(vocab_size, dtype=np.bool_)
            self._seen[np.asarray(prompt_token_ids, dtype=np.int64)] = True

    @property
    def is_trivial(self) -> bool:
        """Whether `apply` never changes anything (the usual case)."""
        sampling = self._sampling
        return (
            self._forbidden is None
            and self._counts is None
            and not sampling.bad_words_ids
            and not len(self._bias_ids)
            and not (sampling.min_tokens and len(self._ends))
        )

    def apply(self, row: Floats, output_token_ids: Sequence[int]) -> None:
        """Changes `row` [vocab_size] in place, given the output so far (which only ever grows)."""
        sampling = self._sampling
        if self._forbidden is not None:
            row[self._forbidden] = -np.inf
        for words in sampling.bad_words_ids:
            head = words[:-1]
            if not head or tuple(output_token_ids[-len(head) :]) == head:
                row[words[-1]] = -np.inf
        if len(output_token_ids) < sampling.min_tokens and len(self._ends):
            row[self._ends] = -np.inf
        if len(self._bias_ids):
            row[self._bias_ids] += self._bias
        if self._counts is not None:
            self._penalise(row, output_token_ids)

    def _penalise(self, row: Floats, output_token_ids: Sequence[int]) -> None:
        assert self._counts is not None
        assert self._seen is not None
        for token_id in output_token_ids[self._num_counted :]:
            self._counts[token_id] += 1
            self._seen[token_id] = True
        self._num_counted = len(output_token_ids)
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            penalty = np.float32(sampling.repetition_penalty)
            seen = np.flatnonzero(self._seen)
            values = row[seen]
            row[seen] = np.where(values > 0, values / penalty, values * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            used = np.flatnonzero(self._counts)
            row[used] -= np.float32(sampling.frequency_penalty) * self._counts[used].astype(np.float32)
            row[used] -= np.float32(sampling.presence_penalty)


def keep_mask(row: Floats, *, min_p: float, top_k: int, top_p: float) -> npt.NDArray[np.bool_]:
    """Which entries of `row` [vocab_size] (logits after temperature) may be drawn; the most likely one always may.

    min_p keeps p >= min_p * max p; top_k keeps the k largest (ties with the k-th too); top_p keeps, among what is left,
    the most likely tokens up to and including the one with which their renormalised sum reaches top_p (ties by id).
    """
    keep = np.isfinite(row)
    best = row.max()
    if min_p > 0.0:
        keep &= row.astype(np.float64) >= float(best) + np.log(min_p)
    if 0 < top_k < row.size:
        keep &= row >= np.partition(row, row.size - top_k)[row.size - top_k]
    if top_p < 1.0:
        candidates = np.flatnonzero(keep)
        weights = np.exp(row[candidates].astype(np.float64) - float(best))
        # By logit, not by weight: two logits may round to one weight, and the larger still comes first.
        order = np.argsort(-row[candidates], kind="stable")
        before = np.cumsum(weights[order])
        total = before[-1]
        before -= weights[order]
        keep[candidates[order[before >= top_p * total]]] = False
    keep[int(row.argmax())] = True
    return keep
