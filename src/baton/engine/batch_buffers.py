"""Turns the per-sequence rows of a step into a `ForwardBatch`, in buffers that are allocated once.

On CPU the batch's tensors are views of the buffers; on CUDA they are copied to buffers on the device. Either way a
batch is valid until the next `build`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.model import ForwardBatch

__all__ = ["BatchBuffers", "SequenceRows", "WantsLogits"]

WantsLogits = Literal["none", "last", "all"]


@dataclass(frozen=True, slots=True)
class SequenceRows:
    """What one sequence computes in this step.

    Attributes:
        token_ids: at least one.
        start: position of the first of them; everything before is in the cache.
        block_ids: of the whole sequence from position 0; must cover `start + len(token_ids)` tokens, may be longer.
        wants_logits: of which tokens.
        tag: see `ForwardBatch`.
    """

    token_ids: Sequence[int] | npt.NDArray[np.int64]
    start: int
    block_ids: Sequence[int] | npt.NDArray[np.int32]
    wants_logits: WantsLogits = "last"
    tag: int = 0


class _Buffer:
    """One array on the host and, on CUDA, its twin on the device."""

    def __init__(self, size: int, dtype: torch.dtype, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(size, dtype=dtype, pin_memory=is_cuda)
        self._device = torch.zeros(size, dtype=dtype, device=device) if is_cuda else None
        self.array: npt.NDArray[Any] = self._host.numpy()

    def tensor(self, size: int) -> Tensor:
        """The first `size` elements where the model runs."""
        if self._device is None:
            return self._host[:size]
        return self._device[:size].copy_(self._host[:size], non_blocking=True)


class BatchBuffers:
    """Buffers for steps of up to `max_batch_tokens` tokens of up to `max_batch_size` sequences.

    Args:
        max_model_len: tokens of the longest sequence.
        block_size: tokens per block.
        device: where the model runs.
    """

    def __init__(
        self, *, max_batch_tokens: int, max_batch_size: int, max_model_len: int, block_size: int, device: torch.device
    ) -> None:
        self._max_batch_tokens = max_batch_tokens
        self._max_batch_size = max_batch_size
        self._block_size = block_size
        self._device = device
        max_blocks = -(-max_model_len // block_size)
        self._token_ids = _Buffer(max_batch_tokens, torch.int64, device)
        self._positions = _Buffer(max_batch_tokens, torch.int32, device)
        self._slots = _Buffer(max_batch_tokens, torch.int64, device)
        self._block_tables = _Buffer(max_batch_size * max_blocks, torch.int32, device)
        self._query_start = _Buffer(max_batch_size + 1, torch.int32, device)
        self._context_lens = _Buffer(max_batch_size, torch.int32, device)
        self._logit_rows = _Buffer(max_batch_tokens, torch.int64, device)
        self._counting = np.arange(max(max_blocks * block_size, max_batch_tokens), dtype=np.int32)
        self._max_blocks = max_blocks

    def build(self, rows: Sequence[SequenceRows]) -> ForwardBatch:
        """Lay out one step. The result shares the buffers: use it before the next call."""
        num_sequences = len(rows)
        assert 1 <= num_sequences <= self._max_batch_size, f"{num_sequences} sequences of {self._max_batch_size}"
        if self._device.type == "cuda":
            # The last step's copies read the pinned buffers that are written now.
            torch.cuda.current_stream(self._device).synchronize()
        context_lens = self._context_lens.array
        for index, row in enumerate(rows):
            context_lens[index] = row.start + len(row.token_ids)
        width = -(-int(context_lens[:num_sequences].max()) // self._block_size)
        assert width <= self._max_blocks, f"a sequence of {width} blocks, the longest may have {self._max_blocks}"
        tables = self._block_tables.array[: num_sequences * width].reshape(num_sequences, width)
        num_tokens, num_logit_rows = self._fill(rows, tables)
        self._fill_slots(tables, num_sequences, num_tokens)
        return ForwardBatch(
            token_ids=self._token_ids.tensor(num_tokens),
            positions=self._positions.tensor(num_tokens),
            slots=self._slots.tensor(num_tokens),
            block_tables=self._block_tables.tensor(num_sequences * width).view(num_sequences, width),
            query_start=self._query_start.tensor(num_sequences + 1),
            context_lens=self._context_lens.tensor(num_sequences),
            logit_rows=self._logit_rows.tensor(num_logit_rows),
            tags=tuple(row.tag for row in rows),
        )

    def _fill(self, rows: Sequence[SequenceRows], tables: npt.NDArray[np.int32]) -> tuple[int, int]:
        """Everything but slots; returns the numbers of tokens and of logit rows."""
        token_ids, positions = self._token_ids.array, self._positions.array
        query_start, logit_rows = self._query_start.array, self._logit_rows.array
        begin = num_logit_rows = 0
        for index, row in enumerate(rows):
            count = len(row.token_ids)
            end, context = begin + count, row.start + count
            num_blocks = -(-context // self._block_size)
            assert count >= 1, "a sequence of this step has no tokens"
            assert end <= self._max_batch_tokens, f"{end} tokens of {self._max_batch_tokens}"
            assert len(row.block_ids) >= num_blocks, f"{len(row.block_ids)} blocks for {context} tokens"
            token_ids[begin:end] = row.token_ids
            positions[begin:end] = self._counting[row.start : context]
            tables[index, :num_blocks] = row.block_ids[:num_blocks]
            query_start[index + 1] = end
            if row.wants_logits == "last":
                logit_rows[num_logit_rows] = end - 1
                num_logit_rows += 1
            elif row.wants_logits == "all":
                logit_rows[num_logit_rows : num_logit_rows + count] = self._counting[begin:end]
                num_logit_rows += count
            begin = end
        return begin, num_logit_rows

    def _fill_slots(self, tables: npt.NDArray[np.int32], num_sequences: int, num_tokens: int) -> None:
        positions, query_start = self._positions.array[:num_tokens], self._query_start.array[: num_sequences + 1]
        sequence = np.repeat(self._counting[:num_sequences], query_start[1:] - query_start[:-1])
        block, offset = np.divmod(positions, self._block_size)
        slots = self._slots.array[:num_tokens]
        np.multiply(tables[sequence, block], self._block_size, out=slots, dtype=np.int64)
        slots += offset
