"""One step as one array of 32-bit words, so that a single small copy takes it to the device. Pure: numpy, no torch.

    decode step of B rows, of which the first are real:
        slots [B] | positions [B] | tokens [B] | entries [B] | blocks [B]      one new block per row at most
    any step of T tokens of S sequences, R of which are sampled:
        tokens [T] | positions [T] | token slots [T] | slots [S] | context lens [S] | query start [S + 1]
        | logit rows [R] | drawn slots [R] | drawn positions [R]
    and behind either, what the tables of the device do not know yet:
        entries [U] | blocks [U] | new slots [N] | their sampling [N, words of `pack_sampling`]

A token of `ON_DEVICE` is the one that the step before drew for this slot. An entry is the place of a block id in the
flat table of all slots. Padding rows have the scratch slot, position 0 and token 0: they read and write nothing but
the scratch block. Every field begins at a multiple of `ALIGN_WORDS`, so that kernels see equally aligned pointers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.engine.sequence_slots import SequenceSlots

__all__ = [
    "ALIGN_WORDS",
    "DECODE_FIELDS",
    "ON_DEVICE",
    "Field",
    "PackedStep",
    "StepPacker",
    "TokenFields",
    "TokenRows",
    "aligned",
]

ALIGN_WORDS = 32
"""128 bytes."""
DECODE_FIELDS = 5
ON_DEVICE = -1

Words = npt.NDArray[np.int32]
Field = tuple[int, int]
"""(first word, number of words)."""


def aligned(num_words: int) -> int:
    """`num_words` and what is missing to the next field's beginning."""
    return -(-num_words // ALIGN_WORDS) * ALIGN_WORDS


@dataclass(frozen=True, slots=True)
class TokenRows:
    """What one sequence computes in a step that is no decode step.

    Attributes:
        block_ids: the sequence's list (see `sequence_slots.py`).
        token_ids: known ones; none: one token, which is on the device.
        start: position of the first.
        wants_logits: how many of the last tokens' logits are wanted.
        sampling: `pack_sampling` of the request; empty where only the host samples it.
    """

    block_ids: list[int]
    token_ids: Sequence[int]
    start: int
    wants_logits: int
    sampling: bytes


@dataclass(frozen=True, slots=True)
class TokenFields:
    """Where the words of a step are that is no decode step; the names are those above.

    Attributes:
        table_width: blocks of the longest sequence.
        query_rows: the fewest and the most tokens of a sequence.
    """

    table_width: int
    query_rows: tuple[int, int]
    tokens: Field
    positions: Field
    token_slots: Field
    slots: Field
    context_lens: Field
    query_start: Field
    logit_rows: Field
    drawn_slots: Field
    drawn_positions: Field


@dataclass(frozen=True, slots=True)
class PackedStep:
    """Where the words of a step are.

    Attributes:
        num_words: of everything.
        entries, blocks, new_slots, samplings: what is new for the device.
        token_fields: None for a decode step, whose fields follow from its bucket.
    """

    num_words: int
    entries: Field
    blocks: Field
    new_slots: Field
    samplings: Field
    token_fields: TokenFields | None = None


class _Updates:
    """What the device does not know yet, while a step is packed."""

    __slots__ = ("blocks", "entries", "new_slots", "samplings")

    def __init__(self) -> None:
        self.entries: list[int] = []
        self.blocks: list[int] = []
        self.new_slots: list[int] = []
        self.samplings: list[bytes] = []


class StepPacker:
    """Packs steps, and knows what the device knows.

    Args:
        slots: gives sequences their slots; slot `slots.num_slots` is the scratch slot.
        block_size: tokens per block.
        max_blocks: blocks of the longest sequence, the width of the device's table.
        scratch_block: to which all entries of the scratch slot point.
        sampling_bytes: of one `pack_sampling`.
    """

    def __init__(
        self, slots: SequenceSlots, *, block_size: int, max_blocks: int, scratch_block: int, sampling_bytes: int
    ) -> None:
        assert sampling_bytes % 4 == 0
        self.scratch_slot = slots.num_slots
        self._slots = slots
        self._block_size = block_size
        self._max_blocks = max_blocks
        self._scratch_block = scratch_block
        self._sampling_words = sampling_bytes // 4
        # The last entry of the scratch slot: to write there changes nothing.
        self._scratch_entry = (slots.num_slots + 1) * max_blocks - 1
        self._no_sampling = bytes(sampling_bytes)  # greedy

    def capacity_words(self, *, max_batch_tokens: int, max_batch_size: int) -> int:
        """Words of the largest step."""
        own = [max_batch_tokens] * 4 + [max_batch_size + 1] * 5 + [max_batch_size]
        new = [max_batch_size * self._max_blocks] * 2 + [max_batch_size * self._sampling_words]
        return sum(aligned(size) for size in own + new) + DECODE_FIELDS * aligned(max_batch_size)

    def pack_decode(
        self,
        out: Words,
        bucket: int,
        block_ids: Sequence[list[int]],
        positions: Sequence[int],
        token_ids: Sequence[int],
        samplings: Sequence[bytes],
    ) -> PackedStep:
        """One token per sequence, each drawn; filled up to `bucket` rows."""
        count, stride = len(block_ids), aligned(bucket)
        assert 1 <= count <= bucket
        self._slots.begin_step()
        updates = _Updates()
        places = [self._place(blocks, sampling, updates) for blocks, sampling in zip(block_ids, samplings, strict=True)]
        fields = out[: DECODE_FIELDS * stride].reshape(DECODE_FIELDS, stride)
        # What a step of the usual kind brings fits the decode fields, and no further kernel has to look at it.
        num_fitting = min(bucket, len(updates.entries))
        for row, (values, padding) in enumerate(
            (
                (places, self.scratch_slot),
                (positions, 0),
                (token_ids, 0),
                (updates.entries[:num_fitting], self._scratch_entry),
                (updates.blocks[:num_fitting], self._scratch_block),
            )
        ):
            fields[row, : len(values)] = values
            fields[row, len(values) : bucket] = padding
        del updates.entries[:num_fitting], updates.blocks[:num_fitting]
        end, new = self._put_updates(out, DECODE_FIELDS * stride, updates)
        return PackedStep(end, *new)

    def pack(self, out: Words, rows: Sequence[TokenRows], *, draws: bool) -> PackedStep:
        """Any rows.

        Args:
            draws: the device draws a token for each row that wants logits; else none is drawn there.
        """
        self._slots.begin_step()
        updates = _Updates()
        slots = [self._place(row.block_ids, row.sampling, updates) for row in rows]
        counts = [len(row.token_ids) or 1 for row in rows]
        query_start = np.zeros(len(rows) + 1, dtype=np.int32)
        np.cumsum(counts, out=query_start[1:])
        starts = np.array([row.start for row in rows], dtype=np.int32)
        context_lens = starts + np.array(counts, dtype=np.int32)
        tokens = np.concatenate([np.asarray(row.token_ids or (ON_DEVICE,), dtype=np.int32) for row in rows])
        positions = np.arange(len(tokens), dtype=np.int32) - np.repeat(query_start[:-1] - starts, counts)
        wanted = [np.arange(end - row.wants_logits, end) for row, end in zip(rows, query_start[1:], strict=True)]
        drawn = [i for i, row in enumerate(rows) if row.wants_logits] if draws else []
        assert all(rows[i].wants_logits == 1 for i in drawn)
        own: list[npt.ArrayLike] = [
            tokens,
            positions,
            np.repeat(np.array(slots, dtype=np.int32), counts),
            slots,
            context_lens,
            query_start,
            np.concatenate(wanted),
            [slots[i] for i in drawn],
            context_lens[np.array(drawn, dtype=np.intp)],
        ]
        fields: list[Field] = []
        begin = 0
        for values in own:
            begin, field = _put(out, begin, values)
            fields.append(field)
        width = -(-int(context_lens.max()) // self._block_size)
        end, new = self._put_updates(out, begin, updates)
        return PackedStep(end, *new, TokenFields(width, (min(counts), max(counts)), *fields))

    def _place(self, block_ids: list[int], sampling: bytes, updates: _Updates) -> int:
        """The slot of a sequence, and what the device must be told of it."""
        placement, is_new = self._slots.place(block_ids)
        slot, known, size = placement.slot, placement.num_blocks, len(block_ids)
        if size > known:
            assert size <= self._max_blocks, f"{size} blocks, the longest sequence may have {self._max_blocks}"
            first = slot * self._max_blocks
            updates.entries += range(first + known, first + size)
            updates.blocks += block_ids[known:]
            placement.num_blocks = size
        if is_new:
            updates.new_slots.append(slot)
            updates.samplings.append(sampling or self._no_sampling)
        return slot

    def _put_updates(self, out: Words, begin: int, updates: _Updates) -> tuple[int, tuple[Field, Field, Field, Field]]:
        end, entries = _put(out, begin, updates.entries)
        end, blocks = _put(out, end, updates.blocks)
        end, new_slots = _put(out, end, updates.new_slots)
        end, samplings = _put(out, end, np.frombuffer(b"".join(updates.samplings), dtype=np.int32))
        return end, (entries, blocks, new_slots, samplings)


def _put(out: Words, begin: int, values: npt.ArrayLike) -> tuple[int, Field]:
    """Writes a field; returns where the next begins, and the field."""
    array = np.asarray(values, dtype=np.int32)
    out[begin : begin + array.size] = array
    return begin + aligned(array.size), (begin, array.size)
