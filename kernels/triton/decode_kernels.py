"""The two kernels of decode attention: one attends by a work list, one merges what it left in pieces.

`decode_attention.py` tells how they go together, `decode_work.py` what the list holds. The workspace has slots of
BLOCK_M packed rows: acc fp32 [slots, BLOCK_M, BLOCK_D], stats fp32 [slots, 2, BLOCK_M], maximum and sum.
"""

from __future__ import annotations

import triton
import triton.language as tl

from baton.kernels.triton.attention_tile import attend, load_queries, merge, packed_rows, store_rows, wide

__all__ = ["attend_kernel", "merge_kernel"]


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
