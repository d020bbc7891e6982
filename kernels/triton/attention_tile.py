"""The arithmetic that the attention kernels share: one query tile against a range of paged keys, and merging results.

A tile is GQA-packed: row `token * GROUP + member` is a query token under one of the GROUP query heads that read one KV
head, so that each key is read once for all of them. Softmax is online and base 2: `m` is the running maximum of the
scores times scale * log2(e), `total` the sum of 2^(score - m), `acc` the values so weighted, all fp32.

Rows do not mix: what a row gets depends on its own query, the keys it sees and the tile's shape. Keys that a row does
not see weigh exactly nothing, whichever tile they come in.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from baton.kernels.triton.launch_table import next_power_of_2

__all__ = [
    "LOG2_E",
    "MAX_GROUP",
    "attend",
    "attend_described",
    "load_queries",
    "merge",
    "packed_rows",
    "padded_head_dim",
    "store_rows",
    "wide",
]

LOG2_E = math.log2(math.e)

MAX_GROUP = 128
"""Query heads of one KV head, at most."""


def padded_head_dim(head_dim: int) -> int:
    """Width of the tiles: a power of two, at least what a tensor core takes."""
    return max(32, next_power_of_2(head_dim))


@triton.jit
def wide(index):
    """`index` as int64, before it is multiplied with a stride; loop variables are Python's own in the interpreter."""
    return tl.full([], 0, tl.int64) + index


@triton.jit
def packed_rows(num_rows, first_position, GROUP: tl.constexpr, BLOCK_M: tl.constexpr):
    """(token, member, whether the row is there, its position) of each packed row of a tile with `num_rows` tokens."""
    row = tl.arange(0, BLOCK_M)
    token = row // GROUP
    member = row % GROUP
    there = token < num_rows
    # Rows that are not there repeat the last one's position, so that they never see more than it does.
    position = first_position + tl.minimum(token, tl.maximum(num_rows - 1, 0))
    return token, member, there, position


@triton.jit
def load_queries(
    q_ptr,
    first_row,
    head,
    token,
    member,
    there,
    q_stride_row,
    q_stride_head,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Packed queries [BLOCK_M, BLOCK_D], zeros where there is none."""
    dim = tl.arange(0, BLOCK_D)
    row = (first_row + token).to(tl.int64)
    offset = row * q_stride_row + (head * GROUP + member).to(tl.int64) * q_stride_head
    mask = there[:, None]
    if HEAD_DIM != BLOCK_D:
        mask = mask & (dim < HEAD_DIM)[None, :]
    q = tl.load(q_ptr + offset[:, None] + dim[None, :], mask=mask, other=0.0)
    if UPCAST:
        q = q.to(tl.float32)
    return q


@triton.jit
def attend(
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
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """Attention of `q` over keys [begin, end), in steps of BLOCK_N from `begin`, a multiple of it, added to the rest.

    Only keys in [first_key, last_key) are read, and block ids only for them. Without MASKED every row sees every key
    of the steps, and the range is a multiple of BLOCK_N inside [first_key, last_key).
    """
    dim = tl.arange(0, BLOCK_D)
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        key = start + tl.arange(0, BLOCK_N)
        if BLOCK_SIZE % BLOCK_N == 0:
            # One page holds the whole step. A step has at least one key to read, maybe not its first.
            page = tl.load(table_ptr + start // BLOCK_SIZE).to(tl.int64)
            offset = page * stride_block + ((start % BLOCK_SIZE) + tl.arange(0, BLOCK_N)) * stride_token
            readable = (key >= first_key) & (key < last_key)
        elif MASKED:
            readable = (key >= first_key) & (key < last_key)
            page = tl.load(table_ptr + key // BLOCK_SIZE, mask=readable, other=0).to(tl.int64)
            offset = page * stride_block + (key % BLOCK_SIZE) * stride_token
        else:
            page = tl.load(table_ptr + key // BLOCK_SIZE).to(tl.int64)
            offset = page * stride_block + (key % BLOCK_SIZE) * stride_token
        key_pointers = key_ptr + offset[None, :] + dim[:, None]
        value_pointers = value_ptr + offset[:, None] + dim[None, :]
        if MASKED:
            if HEAD_DIM != BLOCK_D:
                k = tl.load(key_pointers, mask=readable[None, :] & (dim < HEAD_DIM)[:, None], other=0.0)
                v = tl.load(value_pointers, mask=readable[:, None] & (dim < HEAD_DIM)[None, :], other=0.0)
            else:
                k = tl.load(key_pointers, mask=readable[None, :], other=0.0)
                v = tl.load(value_pointers, mask=readable[:, None], other=0.0)
        elif HEAD_DIM != BLOCK_D:
            k = tl.load(key_pointers, mask=(dim < HEAD_DIM)[:, None], other=0.0)
            v = tl.load(value_pointers, mask=(dim < HEAD_DIM)[None, :], other=0.0)
        else:
            k = tl.load(key_pointers)
            v = tl.load(value_pointers)
        m, total, acc = step(
            q, k, v, m, total, acc, key, position, first_key, window, scale_log2, MASKED, HAS_WINDOW, UPCAST
        )
    return m, total, acc


@triton.jit
def step(
    q,
    k,
    v,
    m,
    total,
    acc,
    key,
    position,
    first_key,
    window,
    scale_log2,
    MASKED: tl.constexpr,
    HAS_WINDOW: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """One step of online softmax: q [BLOCK_M, D] against k [D, BLOCK_N] and v [BLOCK_N, D]."""
    if UPCAST:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
    scores = tl.dot(q, k, input_precision="ieee")
    if MASKED:
        visible = key[None, :] <= position[:, None]
        if HAS_WINDOW:
            visible = visible & (position[:, None] - key[None, :] < window)
        scores = tl.where(visible, scores, float("-inf"))
    highest = tl.maximum(m, tl.max(scores, 1) * scale_log2)
    shift = highest
    if MASKED:
        # A row that has seen no key yet: -inf less -inf would be NaN.
        shift = tl.where(highest == float("-inf"), 0.0, highest)
    weights = tl.exp2(scores * scale_log2 - shift[:, None])
    fade = tl.exp2(m - shift)
    total = total * fade + tl.sum(weights, 1)
    acc = acc * fade[:, None]
    acc = tl.dot(weights.to(v.dtype), v, acc, input_precision="ieee")
    return highest, total, acc


@triton.jit
def merge(m, total, acc, m_next, total_next, acc_next):
    """(m, total, acc) of two ranges of keys together; a left fold of ranges gives the same bits in every kernel.

    The fused multiply-adds are spelled out: left to the compiler, they might be formed otherwise in each place.
    """
    highest = tl.maximum(m, m_next)
    shift = tl.where(highest == float("-inf"), 0.0, highest)
    fade = tl.exp2(m - shift)
    fade_next = tl.exp2(m_next - shift)
    total = tl.fma(total, fade, total_next * fade_next)
    wide = tl.broadcast_to(fade[:, None], acc.shape)
    acc = tl.fma(acc, wide, acc_next * fade_next[:, None])
    return highest, total, acc


@triton.jit
def attend_described(
    q,
    m,
    total,
    acc,
    position,
    kv_descriptor,
    head,
    table_ptr,
    begin,
    end,
    scale_log2,
    BLOCK_D: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    UPCAST: tl.constexpr,
):
    """`attend` without a mask, through a tensor descriptor of tiles [1, 1, 1, BLOCK_N, BLOCK_D] of the pages."""
    for start in range(begin, end, BLOCK_N):
        start = tl.multiple_of(start, BLOCK_N)
        page = tl.load(table_ptr + start // BLOCK_SIZE)
        offset = start % BLOCK_SIZE
        k = kv_descriptor.load([page, 0, head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        v = kv_descriptor.load([page, 1, head, offset, 0]).reshape(BLOCK_N, BLOCK_D)
        key = start + tl.arange(0, BLOCK_N)
        m, total, acc = step(q, k.T, v, m, total, acc, key, position, 0, 0, scale_log2, False, False, UPCAST)
    return m, total, acc


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
