"""Paged attention of prompt chunks: one launch for a batch of sequences, each with many query rows.

A program owns a tile of BLOCK_M packed rows (see `attention_tile.py`) under one KV head and walks its visible keys
once, cached pages and the chunk's own alike. Keys that every row of the tile sees need no mask; the steps on the
diagonal, and those on the lower edge of a sliding window, do. Tiles of late rows, which see most, start first.

Where a page holds a whole number of steps and the GPU has a tensor memory accelerator (Hopper), the unmasked steps'
keys and values come through tensor descriptors; all others through pointers. Warps are not specialised: on Hopper
Triton 3.7 refuses that for a loop that loads anything but descriptor tiles, here the ids of the pages.
"""

from __future__ import annotations

from collections.abc import Sequence

import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from baton.kernels.triton.attention_tile import (
    LOG2_E,
    MAX_GROUP,
    attend,
    attend_described,
    load_queries,
    packed_rows,
    padded_head_dim,
    store_rows,
    wide,
)
from baton.kernels.triton.decode_work import tile_sequence
from baton.kernels.triton.device import INTERPRETED, gpu_of
from baton.kernels.triton.launch_table import Launch, find_launch, next_power_of_2

__all__ = ["prefill_attention", "prefill_kernel"]

_TMA_CAPABILITY = 90


@triton.jit(do_not_specialize=["total_rows", "num_sequences", "search_steps", "fewest_rows", "window", "table_stride"])
def prefill_kernel(
    q_ptr,
    kv_ptr,
    kv_descriptor,
    tables_ptr,
    starts_ptr,
    contexts_ptr,
    out_ptr,
    total_rows,
    num_sequences,
    search_steps,
    fewest_rows,
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
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Program (tile from the last, KV head)."""
    TILE_TOKENS: tl.constexpr = BLOCK_M // GROUP
    tile = tl.num_programs(0) - 1 - tl.program_id(0)
    head = tl.program_id(1)
    dim = tl.arange(0, BLOCK_D)
    # Rows past the last sequence are padding; tile t clears its share of them.
    padding_begin = tl.maximum(tl.load(starts_ptr + num_sequences), tile * TILE_TOKENS)
    for row in range(padding_begin, tl.minimum(total_rows, (tile + 1) * TILE_TOKENS)):
        for member in range(GROUP):
            padding = out_ptr + wide(row) * out_stride_row + (head * GROUP + member) * out_stride_head
            tl.store(padding + dim, tl.zeros([BLOCK_D], out_ptr.dtype.element_ty), mask=dim < HEAD_DIM)

    sequence = tile_sequence(starts_ptr, tile, num_sequences, search_steps, TILE_TOKENS)
    row_begin = tl.load(starts_ptr + sequence)
    sequence_rows = tl.load(starts_ptr + sequence + 1) - row_begin
    skipped = (tile - (row_begin // TILE_TOKENS + sequence)) * TILE_TOKENS
    num_rows = tl.minimum(sequence_rows - skipped, TILE_TOKENS)
    if (num_rows <= 0) | (sequence_rows < fewest_rows):
        return
    first_position = tl.load(contexts_ptr + sequence) - sequence_rows + skipped
    token, member, there, position = packed_rows(num_rows, first_position, GROUP, BLOCK_M)
    q = load_queries(
        q_ptr,
        row_begin + skipped,
        head,
        token,
        member,
        there,
        q_stride_row,
        q_stride_head,
        GROUP,
        HEAD_DIM,
        BLOCK_D,
        UPCAST,
    )
    last_key = first_position + num_rows
    first_key = first_position * 0
    # Keys [full_begin, full_end) are seen by every row.
    full_begin = first_position * 0
    full_end = (first_position + 1) // BLOCK_N * BLOCK_N
    if HAS_WINDOW:
        first_key = tl.maximum(first_position - window + 1, 0)
        full_begin = (tl.maximum(last_key - window, 0) + BLOCK_N - 1) // BLOCK_N * BLOCK_N
        full_begin = tl.minimum(full_begin, (last_key + BLOCK_N - 1) // BLOCK_N * BLOCK_N)
        full_end = tl.maximum(full_end, full_begin)
    begin = first_key // BLOCK_N * BLOCK_N
    key_ptr = kv_ptr + wide(head) * stride_head
    value_ptr = key_ptr + stride_pair
    table_ptr = tables_ptr + wide(sequence) * table_stride
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    if HAS_WINDOW:
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
            tl.minimum(full_begin, last_key),
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
    if DESCRIPTORS:
        m, total, acc = attend_described(
            q,
            m,
            total,
            acc,
            position,
            kv_descriptor,
            head,
            table_ptr,
            full_begin,
            full_end,
            scale_log2,
            BLOCK_D,
            BLOCK_SIZE,
            BLOCK_N,
            UPCAST,
        )
    else:
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
            full_begin,
            full_end,
            first_key,
            last_key,
            window,
            scale_log2,
            HEAD_DIM,
            BLOCK_D,
            BLOCK_SIZE,
            BLOCK_N,
            False,
            HAS_WINDOW,
            UPCAST,
        )
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
        full_end,
        last_key,
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
    store_rows(
        out_ptr,
        acc,
        total,
        row_begin + skipped,
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


def prefill_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
    *,
    fewest_rows: int = 1,
) -> None:
    """Attention of the sequences with at least `fewest_rows` query rows; arguments as in `attention.paged_attention`.

    Rows of other sequences are left as they are; padding rows become zero.

    Raises:
        ValueError: more than `MAX_GROUP` query heads per KV head, or no launch configuration for such shapes.
    """
    num_rows, num_q_heads, head_dim = q.shape
    num_kv_heads, block_size = kv_layer.shape[2], kv_layer.shape[3]
    num_sequences = context_lens.shape[0]
    group = num_q_heads // num_kv_heads
    if group > MAX_GROUP:
        raise ValueError(f"at most {MAX_GROUP} query heads may share a KV head, got {group}")
    gpu = gpu_of(q.device)
    launch, descriptors = _choose_launch(gpu.names, gpu.capability, kv_layer)
    block_m = max(launch.tiles["BLOCK_M"], next_power_of_2(group))
    block_n = launch.tiles["BLOCK_N"]
    num_tiles = num_rows // (block_m // group) + num_sequences
    prefill_kernel[(num_tiles, num_kv_heads)](
        q,
        kv_layer,
        _describe(kv_layer, block_n) if descriptors else None,
        block_tables,
        query_start,
        context_lens,
        out,
        num_rows,
        num_sequences,
        (num_sequences - 1).bit_length(),
        fewest_rows,
        sliding_window or 0,
        block_tables.stride(0),
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=padded_head_dim(head_dim),
        BLOCK_SIZE=block_size,
        BLOCK_M=block_m,
        BLOCK_N=block_n,
        DESCRIPTORS=descriptors,
        HAS_WINDOW=sliding_window is not None,
        UPCAST=INTERPRETED,
        num_warps=launch.num_warps,
        num_stages=launch.num_stages,
    )


def _choose_launch(gpus: Sequence[str], capability: int, kv_layer: Tensor) -> tuple[Launch, bool]:
    """(launch, whether keys and values come through tensor descriptors)."""
    block_size, head_dim = kv_layer.shape[3:]
    dtype = str(kv_layer.dtype).removeprefix("torch.")
    block_d = padded_head_dim(head_dim)
    described = block_d == head_dim and _is_describable(kv_layer) and (INTERPRETED or capability == _TMA_CAPABILITY)
    if described:
        try:
            launch = find_launch("prefill_attention", gpus, dtype, (block_d, 1))
        except ValueError:
            described = False
        else:
            if block_size % launch.tiles["BLOCK_N"] == 0:
                return launch, True
    return find_launch("prefill_attention", gpus, dtype, (block_d, 0)), False


def _is_describable(kv_layer: Tensor) -> bool:
    """Whether the copy engine can address these pages: 16-byte steps, rank 5, sizes below 2^32."""
    item = kv_layer.element_size()
    return kv_layer.data_ptr() % 16 == 0 and all(stride * item % 16 == 0 for stride in kv_layer.stride()[:-1])


def _describe(kv_layer: Tensor, block_n: int) -> TensorDescriptor:
    """Tiles [1, 1, 1, block_n, D] of the pages."""
    return TensorDescriptor.from_tensor(kv_layer, [1, 1, 1, block_n, kv_layer.shape[4]])
