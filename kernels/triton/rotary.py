"""Norm of queries and keys, rotary embedding and the write of K and V into pages, in one launch.

Mirrors `reference/rotary.py`, with the norms of `reference/norm.py` before it where the family has them. One program
per (token, some heads): queries in place, keys and values on their way into the pages. Products are rounded one by one,
never fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.launch_table import next_power_of_2
from baton.kernels.triton.rounding import rounded
from baton.kernels.triton.stream_launches import USES_VECTORS, stream_launch

__all__ = ["compile_cases", "qk_norm_rope_and_cache"]


@triton.jit
def _rotate(
    from_ptrs,
    to_ptrs,
    norm_ptr,
    cos,
    sin,
    live,
    eps,
    dtype: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
):
    """Heads at from_ptrs [HEADS, 1], normed and rotated, to to_ptrs; they may be the same."""
    REST: tl.constexpr = DIM - 2 * HALF
    lane = tl.arange(0, HALF_BLOCK)
    mask = live & (lane < HALF)[None, :]
    first = tl.load(from_ptrs + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    second = tl.load(from_ptrs + HALF + lane[None, :], mask=mask, other=0.0).to(tl.float32)
    if REST > 0:
        rest_lane = 2 * HALF + tl.arange(0, REST_BLOCK)
        rest_mask = live & (rest_lane < DIM)[None, :]
        rest = tl.load(from_ptrs + rest_lane[None, :], mask=rest_mask, other=0.0).to(tl.float32)
    if norm_ptr is not None:
        squares = tl.sum(first * first + second * second, axis=1)
        if REST > 0:
            squares += tl.sum(rest * rest, axis=1)
        factor = tl.rsqrt(squares / DIM + eps)[:, None]
        first_weight = tl.load(norm_ptr + lane, mask=lane < HALF, other=0.0).to(tl.float32)[None, :]
        second_weight = tl.load(norm_ptr + HALF + lane, mask=lane < HALF, other=0.0).to(tl.float32)[None, :]
        first = rounded(rounded(first * factor, dtype) * first_weight, dtype)
        second = rounded(rounded(second * factor, dtype) * second_weight, dtype)
        if REST > 0:
            rest_weight = tl.load(norm_ptr + rest_lane, mask=rest_lane < DIM, other=0.0).to(tl.float32)[None, :]
            rest = rounded(rounded(rest * factor, dtype) * rest_weight, dtype)
    turned = rounded(rounded(first * cos, dtype) - rounded(second * sin, dtype), dtype)
    tl.store(to_ptrs + lane[None, :], turned.to(dtype), mask=mask)
    turned = rounded(rounded(second * cos, dtype) + rounded(first * sin, dtype), dtype)
    tl.store(to_ptrs + HALF + lane[None, :], turned.to(dtype), mask=mask)
    if REST > 0:
        tl.store(to_ptrs + rest_lane[None, :], rest.to(dtype), mask=rest_mask)


@triton.jit
def _rope_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    q_norm_ptr,
    k_norm_ptr,
    cos_ptr,
    sin_ptr,
    positions_ptr,
    slots_ptr,
    kv_ptr,
    eps,
    q_row,
    q_head,
    k_row,
    k_head,
    v_row,
    v_head,
    kv_block,
    kv_pair,
    kv_head,
    kv_token,
    Q_HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HEADS: tl.constexpr,
    HALF_BLOCK: tl.constexpr,
    REST_BLOCK: tl.constexpr,
    DIM_BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = q_ptr.dtype.element_ty
    Q_TILES: tl.constexpr = (Q_HEADS + HEADS - 1) // HEADS
    token = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    lane = tl.arange(0, HALF_BLOCK)
    at = tl.load(positions_ptr + token).to(tl.int64) * HALF + lane
    cos = rounded(tl.load(cos_ptr + at, mask=lane < HALF, other=0.0), dtype)[None, :]
    sin = rounded(tl.load(sin_ptr + at, mask=lane < HALF, other=0.0), dtype)[None, :]
    if tile < Q_TILES:
        head = tile * HEADS + tl.arange(0, HEADS)
        live = (head < Q_HEADS)[:, None]
        q = q_ptr + token * q_row + head.to(tl.int64)[:, None] * q_head
        _rotate(q, q, q_norm_ptr, cos, sin, live, eps, dtype, DIM, HALF, HALF_BLOCK, REST_BLOCK)
    else:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        if slot >= 0:
            head = (tile - Q_TILES) * HEADS + tl.arange(0, HEADS)
            live = (head < KV_HEADS)[:, None]
            head = head.to(tl.int64)[:, None]
            page = kv_ptr + slot // BLOCK_SIZE * kv_block + slot % BLOCK_SIZE * kv_token + head * kv_head
            k = k_ptr + token * k_row + head * k_head
            _rotate(k, page, k_norm_ptr, cos, sin, live, eps, dtype, DIM, HALF, HALF_BLOCK, REST_BLOCK)
            column = tl.arange(0, DIM_BLOCK)[None, :]
            mask = live & (column < DIM)
            v = tl.load(v_ptr + token * v_row + head * v_head + column, mask=mask, other=0.0)
            tl.store(page + kv_pair + column, v, mask=mask)


def _constants(num_q_heads: int, num_kv_heads: int, dim: int, half: int, block_size: int) -> dict[str, int]:
    block = stream_launch("rotary", num_q_heads * dim).tiles["BLOCK"]
    return {
        "Q_HEADS": num_q_heads,
        "KV_HEADS": num_kv_heads,
        "DIM": dim,
        "HALF": half,
        "BLOCK_SIZE": block_size,
        "HEADS": min(max(1, block // next_power_of_2(dim)), next_power_of_2(num_q_heads)),
        "HALF_BLOCK": next_power_of_2(half),
        "REST_BLOCK": next_power_of_2(max(1, dim - 2 * half)),
        "DIM_BLOCK": next_power_of_2(dim),
    }


def qk_norm_rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_norm: Tensor | None,
    k_norm: Tensor | None,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_layer: Tensor,
    slots: Tensor,
) -> None:
    """See `ops.qk_norm_rope_and_cache`; k stays as it is, normed or not.

    int8 and fp8 pages will have their scales beside them, [num_blocks, 2, Hk, block_size], written by the program that
    writes the head, which has all of it in registers.
    """
    num_rows, num_q_heads, dim = q.shape
    num_kv_heads = k.shape[1]
    if num_rows == 0:
        return
    constants = _constants(num_q_heads, num_kv_heads, dim, cos.shape[1], kv_layer.shape[3])
    heads = constants["HEADS"]
    _rope_kernel[(num_rows, triton.cdiv(num_q_heads, heads) + triton.cdiv(num_kv_heads, heads))](
        q,
        k,
        v,
        q_norm,
        k_norm,
        cos,
        sin,
        positions,
        slots,
        kv_layer,
        eps,
        *q.stride()[:2],
        *k.stride()[:2],
        *v.stride()[:2],
        *kv_layer.stride()[:4],
        **constants,
        num_warps=stream_launch("rotary", num_q_heads * dim).num_warps,
        enable_fp_fusion=False,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """Llama-3-8B's heads, Qwen3's with norms, and a partial rotation; the same for every GPU."""
    numbers = ("q_row", "q_head", "k_row", "k_head", "v_row", "v_head", "kv_block", "kv_pair", "kv_head", "kv_token")
    for dtype in ("bf16", "fp16", "fp32"):
        for half, has_norms, slot in ((64, False, "i64"), (64, True, "i64"), (16, True, "i32")):
            norms = ("q_norm_ptr", "k_norm_ptr")
            types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "kv_ptr", *(norms if has_norms else ())), f"*{dtype}")
            types |= {"cos_ptr": "*fp32", "sin_ptr": "*fp32", "positions_ptr": "*i32", "slots_ptr": f"*{slot}"}
            yield CompileCase(
                name=f"rotary/{dtype}/half{half}{'/norms' if has_norms else ''}/{slot}",
                kernel=_rope_kernel,
                types=types | dict.fromkeys(numbers, "i32") | {"eps": "fp32"},
                constants=_constants(32, 8, 128, half, 16) | ({} if has_norms else dict.fromkeys(norms)),
                launch=stream_launch("rotary", 128),
                uses=USES_VECTORS,
                options={"enable_fp_fusion": False},
            )
