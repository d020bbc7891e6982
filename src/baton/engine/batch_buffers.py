"""Turns the per-sequence rows of a step into a `ForwardBatch`, in buffers that are allocated once.

On CPU the batch's tensors are views of the buffers; on CUDA they are copied to buffers on the device. Either way a
batch is valid until the next `build` or `build_decode`.

Block tables stay from step to step: a row is written again only where another sequence stands there now or the
sequence has got a block. For that, lists of block ids are remembered; they may grow and must not change otherwise.
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


@dataclass(slots=True)
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

    def table(self, num_rows: int, row_size: int, width: int) -> Tensor:
        """The first `width` elements of each of the first rows of `row_size`."""
        return self.tensor(num_rows * row_size).view(num_rows, row_size)[:, :width]


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
        self._tables = self._block_tables.array.reshape(max_batch_size, max_blocks)
        self._table_rows: list[tuple[object, int]] = [(None, 0)] * max_batch_size
        self._decode_batch: tuple[tuple[object, ...], ForwardBatch] | None = None

    def build(self, rows: Sequence[SequenceRows]) -> ForwardBatch:
        """Lay out one step. The result shares the buffers: use it before the next call."""
        num_sequences = len(rows)
        self._begin(num_sequences)
        # It writes where a batch of `build_decode` would be read again.
        self._decode_batch = None
        token_ids, positions = self._token_ids.array, self._positions.array
        query_start, context_lens = self._query_start.array, self._context_lens.array
        logit_rows = self._logit_rows.array
        begin = num_logit_rows = 0
        for index, row in enumerate(rows):
            count = len(row.token_ids)
            end, context = begin + count, row.start + count
            assert count >= 1, "a sequence of this step has no tokens"
            assert end <= self._max_batch_tokens, f"{end} tokens of {self._max_batch_tokens}"
            self._place_blocks(index, row.block_ids, context)
            token_ids[begin:end] = row.token_ids
            positions[begin:end] = self._counting[row.start : context]
            query_start[index + 1] = end
            context_lens[index] = context
            if row.wants_logits == "last":
                logit_rows[num_logit_rows] = end - 1
                num_logit_rows += 1
            elif row.wants_logits == "all":
                logit_rows[num_logit_rows : num_logit_rows + count] = self._counting[begin:end]
                num_logit_rows += count
            begin = end
        counts = query_start[1 : num_sequences + 1] - query_start[:num_sequences]
        self._fill_slots(np.repeat(self._counting[:num_sequences], counts), begin)
        return self._batch(num_sequences, begin, num_logit_rows, tuple(row.tag for row in rows))

    def build_decode(
        self,
        token_ids: Sequence[int],
        positions: Sequence[int],
        block_ids: Sequence[Sequence[int]],
        tags: tuple[int, ...],
    ) -> ForwardBatch:
        """`build` of one token per sequence whose logits are wanted; lists as in `SequenceRows`, by sequence."""
        count, size = len(token_ids), self._block_size
        self._begin(count)
        assert count <= self._max_batch_tokens, f"{count} tokens of {self._max_batch_tokens}"
        slots: list[int] = []
        table_rows = self._table_rows
        # Few and plain operations: between two forwards the caches hold nothing of this.
        for index, (position, blocks) in enumerate(zip(positions, block_ids, strict=True)):
            held, held_size = table_rows[index]
            if held is not blocks or held_size != len(blocks):
                self._place_blocks(index, blocks, position + 1)
            slots.append(blocks[position // size] * size + position % size)
        self._token_ids.array[:count] = token_ids
        self._positions.array[:count] = positions
        self._slots.array[:count] = slots
        np.add(self._positions.array[:count], 1, out=self._context_lens.array[:count])
        width = max(positions) // size + 1
        shape = (count, width, tags)
        if self._decode_batch is None or self._decode_batch[0] != shape or self._device.type == "cuda":
            self._query_start.array[: count + 1] = self._counting[: count + 1]
            self._logit_rows.array[:count] = self._counting[:count]
            self._decode_batch = shape, self._batch(count, count, count, tags)
        return self._decode_batch[1]

    def _begin(self, num_sequences: int) -> None:
        assert 1 <= num_sequences <= self._max_batch_size, f"{num_sequences} sequences of {self._max_batch_size}"
        if self._device.type == "cuda":
            # The last step's copies read the pinned buffers that are written now.
            torch.cuda.current_stream(self._device).synchronize()

    def _place_blocks(self, index: int, block_ids: Sequence[int] | npt.NDArray[np.int32], context: int) -> None:
        """Row `index` of the block tables."""
        num_blocks = -(-context // self._block_size)
        assert len(block_ids) >= num_blocks, f"{len(block_ids)} blocks for {context} tokens"
        assert num_blocks <= self._max_blocks, (
            f"a sequence of {num_blocks} blocks, the longest may have {self._max_blocks}"
        )
        held, held_size = self._table_rows[index]
        size = min(len(block_ids), self._max_blocks)
        begin = held_size if held is block_ids else 0
        self._tables[index, begin:size] = block_ids[begin:size]
        self._table_rows[index] = (block_ids if isinstance(block_ids, list) else None, size)

    def _fill_slots(self, sequence: npt.NDArray[np.int32], num_tokens: int) -> None:
        """Slots of tokens whose positions are there; `sequence` says whose each is."""
        block, offset = np.divmod(self._positions.array[:num_tokens], self._block_size)
        slots = self._slots.array[:num_tokens]
        np.multiply(self._tables[sequence, block], self._block_size, out=slots, dtype=np.int64)
        slots += offset

    def _batch(self, num_sequences: int, num_tokens: int, num_logit_rows: int, tags: tuple[int, ...]) -> ForwardBatch:
        width = -(-int(self._context_lens.array[:num_sequences].max()) // self._block_size)
        return ForwardBatch(
            token_ids=self._token_ids.tensor(num_tokens),
            positions=self._positions.tensor(num_tokens),
            slots=self._slots.tensor(num_tokens),
            block_tables=self._block_tables.table(num_sequences, self._max_blocks, width),
            query_start=self._query_start.tensor(num_sequences + 1),
            context_lens=self._context_lens.tensor(num_sequences),
            logit_rows=self._logit_rows.tensor(num_logit_rows),
            tags=tags,
        )
