"""What a request does to its logits before a token is drawn: one processor per sequence, numpy, row by row.

Order (as in vLLM's sampler, so that users carry their expectations over):
    allowed_token_ids -> bad_words -> min_tokens -> logit_bias -> repetition, frequency, presence penalties
    -> greedy argmax, or temperature -> min_p -> top_k -> top_p -> draw (`kernels/reference/sampling.py`).

A processor sees only (sampling parameters, prompt, output so far), so one built anew over the same tokens (after a
preemption or a worker's death) does the same. Rows are handled one at a time on arrays of one shape: what the other
rows of a batch hold cannot change a bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from baton.engine.request import SamplingParams

__all__ = ["LogitsProcessor"]

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
        self._seen: _SeenTokens | None = None
        if sampling.presence_penalty or sampling.frequency_penalty or sampling.repetition_penalty != 1.0:
            self._seen = _SeenTokens(prompt_token_ids)

    @property
    def is_trivial(self) -> bool:
        """Whether `apply` never changes anything (the usual case)."""
        sampling = self._sampling
        return (
            self._forbidden is None
            and self._seen is None
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
        if self._seen is not None:
            self._penalise(row, self._seen, output_token_ids)

    def _penalise(self, row: Floats, seen: _SeenTokens, output_token_ids: Sequence[int]) -> None:
        ids, counts = seen.count(output_token_ids)
        sampling = self._sampling
        values = row[ids]
        if sampling.repetition_penalty != 1.0:
            penalty = np.float32(sampling.repetition_penalty)
            values = np.where(values > 0, values / penalty, values * penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            # Prompt tokens that the output has not repeated have count 0: what is taken off them is 0.
            values -= np.float32(sampling.frequency_penalty) * counts
            values -= np.float32(sampling.presence_penalty) * (counts > 0)
        row[ids] = values


class _SeenTokens:
    """Distinct tokens of prompt and output, and how often the output has each; O(1) per new token."""

    def __init__(self, prompt_token_ids: Sequence[int]) -> None:
        self._places = {token_id: place for place, token_id in enumerate(dict.fromkeys(prompt_token_ids))}
        self._ids = np.zeros(len(self._places) + 256, dtype=np.int64)
        self._ids[: len(self._places)] = list(self._places)
        self._counts = np.zeros(len(self._ids), dtype=np.float32)
        self._num_counted = 0

    def count(self, output_token_ids: Sequence[int]) -> tuple[npt.NDArray[np.int64], Floats]:
        """Takes in what is new of the output; returns ids and counts, views that are valid until the next call."""
        for token_id in output_token_ids[self._num_counted :]:
            place = self._places.setdefault(token_id, len(self._places))
            if place == len(self._ids):
                self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
                self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
            self._ids[place] = token_id
            self._counts[place] += 1
        self._num_counted = len(output_token_ids)
        return self._ids[: len(self._places)], self._counts[: len(self._places)]
