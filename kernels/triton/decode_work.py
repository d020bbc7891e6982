"""The work list of decode attention: which program attends to which keys, made on the GPU from the batch's lengths.

Query rows are cut into tiles (one sequence, up to `tile_tokens` tokens); a tile under one KV head is a segment; a
segment's visible keys are counted in units of `unit_tokens`. All segments in a row, tile by tile and head by head, make
one line of units, and program p takes units [p * share, (p + 1) * share): every program has the same to do, whatever
the lengths, and only segments on a border are in pieces that a second kernel merges. The buffers' sizes and the
grid depend on the number of rows and sequences alone, so a CUDA graph replays them over any contents.

Fixed mode is for exactness: a unit is a split of fixed size, and a piece is one split or the whole segment. So every
result is the left fold of the same splits (see `attention_tile.merge`), wherever the borders lie.

Tile t of the list belongs to the last sequence s with query_start[s] // tile_tokens + s <= t; the numbering leaves
gaps, tiles without rows, so that it needs no sum over sequences.

    tiles     int32 [num_tiles, 8]: sequence, first row, rows, position of the first row, first unit, units,
              units of all tiles before, first slot of the pieces (fixed mode; -1: in one piece)
    programs  int32 [num_programs, 2]: first and last + 1 of the segments (tile * num_kv_heads + head) of a program
    header    int32 [1]: share
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.launch_table import Launch

__all__ = ["ALL_ROWS", "PLAN", "RECORD", "TILES_PER_STEP", "WorkList", "WorkShape", "plan_kernel", "plan_work"]

RECORD = 8
"""Numbers per tile."""

ALL_ROWS = 2**31 - 1
TILES_PER_STEP = 256
PLAN = Launch.of(8, 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkShape:
    """What a work list is for; everything that the host has to know of a batch.

    Attributes:
        num_rows, num_sequences: T and S of the call, or of the largest one that the buffers shall serve.
        num_kv_heads: of this rank.
        tile_tokens: query tokens in a tile.
        unit_tokens: keys in a unit.
        num_programs: grid size.
        min_share: least units of a program.
        num_slots: pieces that the workspace holds; fixed mode, otherwise 2 * num_programs.
        fixed: fixed mode.
        window: sliding window, or None.
        max_query_rows: sequences with more rows are left to another kernel.
    """

    num_rows: int
    num_sequences: int
    num_kv_heads: int
    tile_tokens: int
    unit_tokens: int
    num_programs: int
    min_share: int
    num_slots: int
    fixed: bool
    window: int | None
    max_query_rows: int = ALL_ROWS

    @property
    def num_tiles(self) -> int:
        """Tiles of any batch with that many rows and sequences, gaps included."""
        return self.num_rows // self.tile_tokens + self.num_sequences


@dataclass(frozen=True, slots=True)
class WorkList:
    """The buffers of one work list, see the module; valid for the batch that `plan_work` last saw."""

    shape: WorkShape
    tiles: Tensor
    programs: Tensor
    header: Tensor

    @classmethod
    def empty(cls, shape: WorkShape, device: torch.device) -> WorkList:
        return cls(
            shape,
            tiles=torch.empty((shape.num_tiles, RECORD), dtype=torch.int32, device=device),
            programs=torch.empty((shape.num_programs, 2), dtype=torch.int32, device=device),
            header=torch.empty(1, dtype=torch.int32, device=device),
        )


@triton.jit
def tile_sequence(starts_ptr, tile, num_sequences, search_steps, TILE_TOKENS: tl.constexpr):
    """The last sequence s with query_start[s] // TILE_TOKENS + s <= tile; `tile` is a number or a vector."""
    low = tile * 0
    high = low + num_sequences - 1
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        before = tl.load(starts_ptr + middle) // TILE_TOKENS + middle <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    return low


@triton.jit(
    do_not_specialize=[
        "num_sequences",
        "num_tiles",
        "num_programs",
        "num_slots",
        "min_share",
        "window",
        "max_query_rows",
        "sequence_steps",
        "tile_steps",
    ]
)
def plan_kernel(
    starts_ptr,
    contexts_ptr,
    tiles_ptr,
    programs_ptr,
    header_ptr,
    num_sequences,
    num_tiles,
    num_programs,
    num_slots,
    min_share,
    window,
    max_query_rows,
    sequence_steps,
    tile_steps,
    NUM_KV_HEADS: tl.constexpr,
    TILE_TOKENS: tl.constexpr,
    UNIT_TOKENS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    FIXED: tl.constexpr,
    RECORD_SIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program writes the whole list."""
    lane = tl.arange(0, BLOCK)
    units_before = 0
    for start in range(0, num_tiles, BLOCK):
        tile = start + lane
        sequence = tile_sequence(starts_ptr, tile, num_sequences, sequence_steps, TILE_TOKENS)
        row_begin = tl.load(starts_ptr + sequence)
        sequence_rows = tl.load(starts_ptr + sequence + 1) - row_begin
        skipped = (tile - (row_begin // TILE_TOKENS + sequence)) * TILE_TOKENS
        rows = tl.minimum(tl.maximum(sequence_rows - skipped, 0), TILE_TOKENS)
        rows = tl.where((tile < num_tiles) & (sequence_rows <= max_query_rows), rows, 0)
        position = tl.load(contexts_ptr + sequence) - sequence_rows + skipped
        first_key = tile * 0
        if HAS_WINDOW:
            first_key = tl.maximum(position - window + 1, 0)
        first_unit = first_key // UNIT_TOKENS
        units = tl.where(rows > 0, (position + rows + UNIT_TOKENS - 1) // UNIT_TOKENS - first_unit, 0)
        record = tiles_ptr + tile * RECORD_SIZE
        mask = tile < num_tiles
        tl.store(record, sequence, mask=mask)
        tl.store(record + 1, row_begin + skipped, mask=mask)
        tl.store(record + 2, rows, mask=mask)
        tl.store(record + 3, position, mask=mask)
        tl.store(record + 4, first_unit, mask=mask)
        tl.store(record + 5, units, mask=mask)
        tl.store(record + 6, units_before + tl.cumsum(units, 0) - units, mask=mask)
        tl.store(record + 7, tile * 0 - 1, mask=mask)
        units_before += tl.sum(units, 0)
    total = units_before * NUM_KV_HEADS
    share = tl.maximum((total + num_programs - 1) // num_programs, min_share)
    tl.store(header_ptr, share)
    # What one thread has stored, another one loads from here on.
    tl.debug_barrier()
    if FIXED:
        slots_before = 0
        for start in range(0, num_tiles, BLOCK):
            tile = start + lane
            mask = tile < num_tiles
            units = tl.load(tiles_ptr + tile * RECORD_SIZE + 5, mask=mask, other=0)
            # A segment that is more than one program's share goes to several, while there are slots.
            slots = tl.where(units > share, units * NUM_KV_HEADS, 0)
            slots_after = slots_before + tl.cumsum(slots, 0)
            cut = mask & (slots > 0) & (slots_after <= num_slots)
            tl.store(tiles_ptr + tile * RECORD_SIZE + 7, slots_after - slots, mask=cut)
            slots_before += tl.sum(slots, 0)
    for start in range(0, num_programs, BLOCK):
        program = start + lane
        begin = program * share
        end = tl.minimum(begin + share, total)
        first = segment_of(tiles_ptr, begin, num_tiles, tile_steps, NUM_KV_HEADS, RECORD_SIZE)
        last = segment_of(tiles_ptr, end - 1, num_tiles, tile_steps, NUM_KV_HEADS, RECORD_SIZE) + 1
        mask = program < num_programs
        tl.store(programs_ptr + 2 * program, tl.where(begin < total, first, 0), mask=mask)
        tl.store(programs_ptr + 2 * program + 1, tl.where(begin < total, last, 0), mask=mask)


@triton.jit
def segment_of(tiles_ptr, unit, num_tiles, search_steps, NUM_KV_HEADS: tl.constexpr, RECORD_SIZE: tl.constexpr):
    """The segment that holds each unit of a vector; anything for units past the end."""
    low = unit * 0
    high = low + num_tiles - 1
    for _ in range(search_steps):
        middle = (low + high + 1) // 2
        before = tl.load(tiles_ptr + middle * RECORD_SIZE + 6) * NUM_KV_HEADS <= unit
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    units = tl.maximum(tl.load(tiles_ptr + low * RECORD_SIZE + 5), 1)
    return low * NUM_KV_HEADS + (unit - tl.load(tiles_ptr + low * RECORD_SIZE + 6) * NUM_KV_HEADS) // units


def plan_work(work: WorkList, query_start: Tensor, context_lens: Tensor) -> None:
    """Fill `work` for the batch of query_start int32 [S+1] and context_lens int32 [S]; one launch, nothing waits."""
    shape = work.shape
    assert context_lens.shape[0] == shape.num_sequences, "a work list is for a fixed number of sequences"
    plan_kernel[(1,)](
        query_start,
        context_lens,
        work.tiles,
        work.programs,
        work.header,
        shape.num_sequences,
        shape.num_tiles,
        shape.num_programs,
        shape.num_slots,
        shape.min_share,
        shape.window or 0,
        shape.max_query_rows,
        (shape.num_sequences - 1).bit_length(),
        (shape.num_tiles - 1).bit_length(),
        NUM_KV_HEADS=shape.num_kv_heads,
        TILE_TOKENS=shape.tile_tokens,
        UNIT_TOKENS=shape.unit_tokens,
        HAS_WINDOW=shape.window is not None,
        FIXED=shape.fixed,
        RECORD_SIZE=RECORD,
        BLOCK=TILES_PER_STEP,
        num_warps=PLAN.num_warps,
        num_stages=PLAN.num_stages,
    )
