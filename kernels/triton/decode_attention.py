"""Paged attention of few query rows over many keys: split over the keys, persistent, safe inside CUDA graphs.

    plan_work      once per step     lengths on the GPU -> work list            (decode_work.py)
    attend_kernel  once per layer    program p walks its share of the list; whole segments go to `out`, pieces to the
                                     workspace, each with its maximum and sum
    merge_kernel   once per layer    merges the pieces of each segment that has several; in fixed mode in the order of
                                     their keys

A shared list cuts where it balances best, so a row's last bits depend on the batch. A fixed list (`fixed=True`) has
splits of fixed size at fixed places and fixed tiles, for prompts and single tokens alike: there a row's bits depend on
its own sequence alone. The split is FlashDecoding's (Dao and others, 2023), the equal share stream-K's (Osama and
others, 2023).

A `DecodePlan` owns the buffers: work list and workspace. It may serve all layers of a step, and, filled again by
`update`, every later step with the same numbers of rows and sequences. One stream at a time.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.attention_tile import attend, load_queries, merge, packed_rows, wide
from baton.kernels.triton.compile_case import TYPE_NAMES, CompileCase
from baton.kernels.triton.decode_work import ALL_ROWS, RECORD, WorkList, WorkShape, plan_work
from baton.kernels.triton.device import INTERPRETED, Gpu, gpu_of
from baton.kernels.triton.launch_table import TABLE, Launch, find_launch, next_power_of_2

__all__ = ["MAX_GROUP", "DecodePlan", "compile_cases", "decode_attention"]

MAX_GROUP = 128
"""Query heads of one KV head, at most."""

_LARGEST_STREAMED_TILE = 64
_FIXED_TILE = 64
_LEAST_SHARE_TOKENS = 256
_MERGE = Launch.of(4, 1, PIECES=16, STAGES=8)
_FIXED_WORKSPACE_BYTES = 128 << 20
_LOG2_E = math.log2(math.e)


@triton.jit
def store_rows(
    out_ptr,
    acc,
    total,
    first_row,
    head,
    token,
    member,
    there,
    out_stride_row,
    out_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """acc / total of packed rows to `out`."""
    dim = tl.arange(0, BLOCK_D)
    offset = (first_row + token).to(tl.int64) * out_stride_row + (head * GROUP + member).to(tl.int64) * out_stride_head
    inverse = 1.0 / tl.where(there, total, 1.0)
    mask = there[:, None] & (dim < HEAD_DIM)[None, :]
    value = (acc * inverse[:, None]).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + offset[:, None] + dim[None, :], value, mask=mask)


@triton.jit
def store_piece(acc_ptr, stats_ptr, slot, m, total, acc, there, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """A piece's rows to its slot of the workspace."""
    row = tl.arange(0, BLOCK_M)
    dim = tl.arange(0, BLOCK_D)
    base = wide(slot) * BLOCK_M
    tl.store(stats_ptr + 2 * base + row, m, mask=there)
    tl.store(stats_ptr + 2 * base + BLOCK_M + row, total, mask=there)
    tl.store(acc_ptr + base * BLOCK_D + row[:, None] * BLOCK_D + dim[None, :], acc, mask=there[:, None])


@triton.jit(do_not_specialize=["total_rows", "num_sequences", "window", "table_stride"])
def attend_kernel(
    q_ptr,
    kv_ptr,
    tables_ptr,
    starts_ptr,
    out_ptr,
    tiles_ptr,
    programs_ptr,
    header_ptr,
    acc_ptr,
    stats_ptr,
    total_rows,
    num_sequences,
    window,
    table_stride,
    scale_log2,
    q_stride_row,
    q_stride_head,
    out_stride_row,
    out_stride_head,
    stride_block,
    stride_pair,
    stride_head,
    stride_token,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UNIT_TOKENS: tl.constexpr,
    RECORD_SIZE: tl.constexpr,
    FIXED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program p: segments programs[p], as far as they lie in its share of the units."""
    program = tl.program_id(0)
    share = tl.load(header_ptr)
    share_begin = program * share
    share_end = share_begin + share
    for segment in range(tl.load(programs_ptr + 2 * program), tl.load(programs_ptr + 2 * program + 1)):
        tile = segment // NUM_KV_HEADS
        head = segment % NUM_KV_HEADS
        record = tiles_ptr + tile * RECORD_SIZE
        sequence = tl.load(record)
        first_row = tl.load(record + 1)
        num_rows = tl.load(record + 2)
        first_position = tl.load(record + 3)
        first_unit = tl.load(record + 4)
        units = tl.load(record + 5)
        begin_unit = tl.load(record + 6) * NUM_KV_HEADS + head * units
        first_slot = tl.load(record + 7)
        piece_begin = tl.maximum(share_begin - begin_unit, 0)
        piece_end = tl.minimum(share_end - begin_unit, units)
        if FIXED:
            # An uncut segment is done whole by the program where it begins.
            piece_end = tl.where(first_slot >= 0, piece_end, tl.where(share_begin <= begin_unit, units, 0))
            piece_begin = tl.where(first_slot >= 0, piece_begin, 0)
        token, member, there, position = packed_rows(num_rows, first_position, GROUP, BLOCK_M)
        q = load_queries(
            q_ptr, first_row, head, token, member, there, q_stride_row, q_stride_head, GROUP, HEAD_DIM, BLOCK_D, UPCAST
        )
        last_key = first_position + num_rows
        first_key = first_position * 0
        if HAS_WINDOW:
            first_key = tl.maximum(first_position - window + 1, 0)
        key_ptr = kv_ptr + wide(head) * stride_head
        value_ptr = key_ptr + stride_pair
        table_ptr = tables_ptr + wide(sequence) * table_stride
        m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        total = tl.zeros([BLOCK_M], tl.float32)
        acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
        if FIXED:
            for unit in range(piece_begin, piece_end):
                begin = tl.maximum((first_unit + unit) * UNIT_TOKENS, first_key // BLOCK_N * BLOCK_N)
                end = tl.minimum((first_unit + unit + 1) * UNIT_TOKENS, last_key)
                m_split, l_split, acc_split = attend(
                    q,
                    tl.full([BLOCK_M], float("-inf"), tl.float32),
                    tl.zeros([BLOCK_M], tl.float32),
                    tl.zeros([BLOCK_M, BLOCK_D], tl.float32),
                    position,
                    key_ptr,
                    value_ptr,
                    table_ptr,
                    stride_block,
                    stride_token,
                    begin,
                    end,
                    first_key,
                    last_key,
                    window,
                    scale_log2,
                    HEAD_DIM,
                    BLOCK_D,
                    BLOCK_SIZE,
                    BLOCK_N,
                    True,
                    HAS_WINDOW,
                    UPCAST,
                )
                if first_slot >= 0:
                    slot = first_slot + head * units + unit
                    store_piece(acc_ptr, stats_ptr, slot, m_split, l_split, acc_split, there, BLOCK_M, BLOCK_D)
                m, total, acc = merge(m, total, acc, m_split, l_split, acc_split)
            whole = (first_slot < 0) & (piece_begin < piece_end)
        else:
            begin = tl.maximum((first_unit + piece_begin) * UNIT_TOKENS, first_key // BLOCK_N * BLOCK_N)
            end = tl.minimum((first_unit + piece_end) * UNIT_TOKENS, last_key)
            m, total, acc = attend(
                q,
                m,
                total,
                acc,
                position,
                key_ptr,
                value_ptr,
                table_ptr,
                stride_block,
                stride_token,
                begin,
                end,
                first_key,
                last_key,
                window,
                scale_log2,
                HEAD_DIM,
                BLOCK_D,
                BLOCK_SIZE,
                BLOCK_N,
                True,
                HAS_WINDOW,
                UPCAST,
            )
            whole = piece_end - piece_begin == units
            if not whole:
                # The first piece of a segment is the last thing that a program does, any other piece its first.
                slot = 2 * program + tl.where(piece_begin == 0, 1, 0)
                store_piece(acc_ptr, stats_ptr, slot, m, total, acc, there, BLOCK_M, BLOCK_D)
        if whole:
            store_rows(
                out_ptr,
                acc,
                total,
                first_row,
                head,
                token,
                member,
                there,
                out_stride_row,
                out_stride_head,
                GROUP,
                HEAD_DIM,
                BLOCK_D,
            )
    # Rows past the last sequence are padding.
    dim = tl.arange(0, BLOCK_D)
    for row in range(tl.load(starts_ptr + num_sequences) + program, total_rows, tl.num_programs(0)):
        for head in range(NUM_KV_HEADS * GROUP):
            padding = out_ptr + wide(row) * out_stride_row + head * out_stride_head + dim
            tl.store(padding, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)


@triton.jit
def merge_kernel(
    out_ptr,
    tiles_ptr,
    programs_ptr,
    header_ptr,
    acc_ptr,
    stats_ptr,
    out_stride_row,
    out_stride_head,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PIECES: tl.constexpr,
    STAGES: tl.constexpr,
    RECORD_SIZE: tl.constexpr,
    FIXED: tl.constexpr,
):
    """Program (p, i): packed rows i, i + grid, ... of the segment that begins in the share of p and ends in another.

    There is at most one, the last segment of p, and every segment in pieces is that of one p.
    """
    program = tl.program_id(0)
    last = tl.load(programs_ptr + 2 * program + 1)
    if last == 0:
        return
    share = tl.load(header_ptr)
    tile = (last - 1) // NUM_KV_HEADS
    head = (last - 1) % NUM_KV_HEADS
    record = tiles_ptr + tile * RECORD_SIZE
    first_row = tl.load(record + 1)
    num_rows = tl.load(record + 2)
    units = tl.load(record + 5)
    begin_unit = tl.load(record + 6) * NUM_KV_HEADS + head * units
    if (begin_unit < program * share) | (begin_unit + units <= (program + 1) * share):
        return
    if FIXED:
        first_slot = tl.load(record + 7)
        if first_slot < 0:
            return
        first_slot += head * units
        pieces = units
    else:
        first_slot = program
        pieces = (begin_unit + units - 1) // share - program + 1
    dim = tl.arange(0, BLOCK_D)
    one = tl.arange(0, 1)
    for row in range(tl.program_id(1), num_rows * GROUP, tl.num_programs(1)):
        m = tl.full([1], float("-inf"), tl.float32)
        total = tl.zeros([1], tl.float32)
        acc = tl.zeros([1, BLOCK_D], tl.float32)
        if FIXED:
            # One after the other, as the attention kernel does it, with the loads of several in flight.
            for piece in tl.range(0, pieces, num_stages=STAGES):
                base = wide(first_slot + piece) * BLOCK_M
                m_piece = tl.load(stats_ptr + 2 * base + row + one)
                total_piece = tl.load(stats_ptr + 2 * base + BLOCK_M + row + one)
                acc_piece = tl.load(acc_ptr + (base + row) * BLOCK_D + dim[None, :])
                m, total, acc = merge(m, total, acc, m_piece, total_piece, acc_piece)
        else:
            for start in range(0, pieces, PIECES):
                piece = start + tl.arange(0, PIECES)
                there = piece < pieces
                base = wide(2 * (first_slot + piece) + tl.where(piece == 0, 1, 0)) * BLOCK_M
                m_piece = tl.load(stats_ptr + 2 * base + row, mask=there, other=float("-inf"))
                total_piece = tl.load(stats_ptr + 2 * base + BLOCK_M + row, mask=there, other=0.0)
                acc_piece = tl.load(
                    acc_ptr + (base[:, None] + row) * BLOCK_D + dim[None, :], mask=there[:, None], other=0.0
                )
                highest = tl.max(m_piece, 0, keep_dims=True)
                shift = tl.where(highest == float("-inf"), 0.0, highest)
                weight = tl.exp2(m_piece - shift)
                total_some = tl.sum(total_piece * weight, 0, keep_dims=True)
                acc_some = tl.sum(acc_piece * weight[:, None], 0, keep_dims=True)
                m, total, acc = merge(m, total, acc, highest, total_some, acc_some)
        row_vector = row + one
        store_rows(
            out_ptr,
            acc,
            total,
            first_row,
            head,
            row_vector // GROUP,
            row_vector % GROUP,
            row_vector >= 0,
            out_stride_row,
            out_stride_head,
            GROUP,
            HEAD_DIM,
            BLOCK_D,
        )


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Work list, workspace and launch of decode attention for one shape of batch. See the module for ownership."""

    work: WorkList
    launch: Launch
    tile_rows: int
    tokens_per_tile: int
    acc: Tensor
    stats: Tensor

    @classmethod
    def empty(
        cls,
        *,
        num_rows: int,
        num_sequences: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None,
        fixed: bool,
        tokens_per_tile: int,
        max_context: int,
        max_query_rows: int = ALL_ROWS,
    ) -> DecodePlan:
        """Buffers for batches of `num_rows` query rows (padding included) of `num_sequences` sequences.

        Args:
            tokens_per_tile: query rows of a sequence that should share one reading of its keys, as far as that fits.
            max_context: no sequence has more keys; bounds the workspace of fixed mode.
            max_query_rows: sequences with more rows are passed over.
        Raises:
            ValueError: more than `MAX_GROUP` query heads per KV head, or no launch configuration for such shapes.
        """
        gpu = gpu_of(device)
        group = num_q_heads // num_kv_heads
        launch, tile_rows = _choose_launch(gpu, group, head_dim, dtype, fixed=fixed, tokens_per_tile=tokens_per_tile)
        block_d = padded_head_dim(head_dim)
        unit = launch.tiles["SPLIT"] if fixed else launch.tiles["BLOCK_N"]
        num_programs = gpu.num_sms * launch.tiles["PROGRAMS_PER_SM"]
        tile_tokens = tile_rows // group
        num_slots = 2 * num_programs
        if fixed:
            pieces = (num_rows // tile_tokens + num_sequences) * num_kv_heads * -(-max_context // unit)
            num_slots = min(pieces, _FIXED_WORKSPACE_BYTES // (tile_rows * block_d * 4))
        shape = WorkShape(
            num_rows=num_rows,
            num_sequences=num_sequences,
            num_kv_heads=num_kv_heads,
            tile_tokens=tile_tokens,
            unit_tokens=unit,
            num_programs=num_programs,
            min_share=1 if fixed else -(-_LEAST_SHARE_TOKENS // unit),
            num_slots=num_slots,
            fixed=fixed,
            window=window,
            max_query_rows=max_query_rows,
        )
        return cls(
            work=WorkList.empty(shape, device),
            launch=launch,
            tile_rows=tile_rows,
            tokens_per_tile=tokens_per_tile,
            acc=torch.empty((num_slots, tile_rows, block_d), dtype=torch.float32, device=device),
            stats=torch.empty((num_slots, 2, tile_rows), dtype=torch.float32, device=device),
        )

    def update(self, query_start: Tensor, context_lens: Tensor) -> None:
        """Make the work list of this batch; launches one small kernel, waits for nothing."""
        plan_work(self.work, query_start, context_lens)


def padded_head_dim(head_dim: int) -> int:
    """Width of the tiles: a power of two, at least what a tensor core takes."""
    return max(32, next_power_of_2(head_dim))


def _choose_launch(
    gpu: Gpu, group: int, head_dim: int, dtype: torch.dtype, *, fixed: bool, tokens_per_tile: int
) -> tuple[Launch, int]:
    """(launch, packed rows of a tile)."""
    if group > MAX_GROUP:
        raise ValueError(f"at most {MAX_GROUP} query heads may share a KV head, got {group}")
    least = next_power_of_2(group)
    if fixed:
        # One tile for every batch: its shape is part of the bits.
        tile_rows = max(_FIXED_TILE, least)
    else:
        wanted = next_power_of_2(group * tokens_per_tile)
        tile_rows = max(16, least, min(wanted, _LARGEST_STREAMED_TILE))
    name = "fixed_attention" if fixed else "decode_attention"
    bucket = (tile_rows, padded_head_dim(head_dim))
    return find_launch(name, gpu.names, str(dtype).removeprefix("torch."), bucket), tile_rows


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    scale: float,
    out: Tensor,
    plan: DecodePlan,
) -> None:
    """Attention of one layer, by a plan that was updated for this batch; shapes as in `attention.paged_attention`."""
    shape = plan.work.shape
    _, num_q_heads, head_dim = q.shape
    block_d = padded_head_dim(head_dim)
    group = num_q_heads // shape.num_kv_heads
    assert q.shape[0] == shape.num_rows, "a plan is for a fixed number of rows"
    attend_kernel[(shape.num_programs,)](
        q,
        kv_layer,
        block_tables,
        query_start,
        out,
        plan.work.tiles,
        plan.work.programs,
        plan.work.header,
        plan.acc,
        plan.stats,
        q.shape[0],
        shape.num_sequences,
        shape.window or 0,
        block_tables.stride(0),
        scale * _LOG2_E,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        NUM_KV_HEADS=shape.num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=kv_layer.shape[3],
        BLOCK_M=plan.tile_rows,
        BLOCK_N=plan.launch.tiles["BLOCK_N"],
        UNIT_TOKENS=shape.unit_tokens,
        RECORD_SIZE=RECORD,
        FIXED=shape.fixed,
        HAS_WINDOW=shape.window is not None,
        UPCAST=INTERPRETED,
        num_warps=plan.launch.num_warps,
        num_stages=plan.launch.num_stages,
    )
    merge_kernel[(shape.num_programs, plan.tokens_per_tile * group)](
        out,
        plan.work.tiles,
        plan.work.programs,
        plan.work.header,
        plan.acc,
        plan.stats,
        out.stride(0),
        out.stride(1),
        NUM_KV_HEADS=shape.num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=plan.tile_rows,
        PIECES=_MERGE.tiles["PIECES"],
        STAGES=_MERGE.tiles["STAGES"],
        RECORD_SIZE=RECORD,
        FIXED=shape.fixed,
        num_warps=_MERGE.num_warps,
        num_stages=_MERGE.num_stages,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """See `compile_case.py`."""
    for table in ("decode_attention", "fixed_attention"):
        fixed = table == "fixed_attention"
        buckets = sorted({bucket for gpu, _, bucket in TABLE[table] if gpu != "interpreter"})
        for dtype in ("bfloat16", "float32"):
            for rows, block_d in buckets:
                launch = find_launch(table, gpus, dtype, (rows, block_d))
                yield _attend_case(f"{table}/{dtype}/m{rows}/d{block_d}", dtype, block_d, rows, launch, fixed=fixed)
        launch = find_launch(table, gpus, "float16", (64, 128))
        yield _attend_case(f"{table}/float16/m64/d80", "float16", 80, 64, launch, fixed=fixed)
        yield _merge_case(f"{table}/merge", fixed=fixed)


_STRIDES = (
    "q_stride_row",
    "q_stride_head",
    "out_stride_row",
    "out_stride_head",
    "stride_block",
    "stride_pair",
    "stride_head",
    "stride_token",
)


def _attend_case(name: str, dtype: str, head_dim: int, rows: int, launch: Launch, *, fixed: bool) -> CompileCase:
    lists = ("tables_ptr", "starts_ptr", "tiles_ptr", "programs_ptr", "header_ptr")
    numbers = ("total_rows", "num_sequences", "window", "table_stride", *_STRIDES)
    return CompileCase(
        name=name,
        kernel=attend_kernel,
        types={
            **dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), "*" + TYPE_NAMES[dtype]),
            **dict.fromkeys(lists, "*i32"),
            **dict.fromkeys(("acc_ptr", "stats_ptr"), "*fp32"),
            **dict.fromkeys(numbers, "i32"),
            "scale_log2": "fp32",
        },
        constants={
            "NUM_KV_HEADS": 8,
            "GROUP": min(4, rows),
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_SIZE": 16,
            "BLOCK_M": rows,
            "BLOCK_N": launch.tiles["BLOCK_N"],
            "UNIT_TOKENS": launch.tiles["SPLIT"] if fixed else launch.tiles["BLOCK_N"],
            "RECORD_SIZE": RECORD,
            "FIXED": fixed,
            "HAS_WINDOW": False,
            "UPCAST": False,
        },
        launch=launch,
        uses={90: ("wgmma.mma_async",)} if fixed and dtype != "float32" else {},
        spill_limit_bytes=_spill_limit_bytes(head_dim, rows, dtype, fixed=fixed),
    )


def _spill_limit_bytes(head_dim: int, rows: int, dtype: str, *, fixed: bool) -> int:
    """More than 64 query heads per KV head and wide heads are rare enough; so are fixed splits of heads of 256."""
    if rows == 128 and head_dim >= (128 if fixed or dtype == "float32" else 256):
        return 4096
    return 512 if fixed and head_dim == 256 else 0


def _merge_case(name: str, *, fixed: bool) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=merge_kernel,
        types={
            "out_ptr": "*bf16",
            **dict.fromkeys(("tiles_ptr", "programs_ptr", "header_ptr"), "*i32"),
            **dict.fromkeys(("acc_ptr", "stats_ptr"), "*fp32"),
            **dict.fromkeys(("out_stride_row", "out_stride_head"), "i32"),
        },
        constants={
            "NUM_KV_HEADS": 8,
            "GROUP": 4,
            "HEAD_DIM": 128,
            "BLOCK_D": 128,
            "BLOCK_M": 64 if fixed else 16,
            "PIECES": _MERGE.tiles["PIECES"],
            "STAGES": _MERGE.tiles["STAGES"],
            "RECORD_SIZE": RECORD,
            "FIXED": fixed,
        },
        launch=_MERGE,
        uses={},
    )
