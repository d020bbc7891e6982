"""Norms of queries and keys, rotary embedding and the write of K and V into pages: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import (
    DTYPES,
    expect,
    expect_dense_rows,
    expect_dtype,
    expect_index,
    expect_kv_layer,
    expect_like,
    expect_shape,
)
from baton.kernels.checked.norm import rms_norm
from baton.kernels.reference import rotary as reference

__all__ = ["qk_norm_rope_and_cache", "rope_and_cache"]


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
    """`rms_norm` of the heads of q and k, then `rope_and_cache`: one launch on a GPU.

    k holds its normed heads afterwards, or what it held before: the backend's choice. v stays as it is.

    Args:
        q_norm, k_norm: [D], dtype of q, contiguous; both None where the family has no such norms.
        eps: of the norms.
        q, k, v, cos, sin, positions, kv_layer, slots: see `rope_and_cache`.
    """
    expect((q_norm is None) == (k_norm is None), "q_norm and k_norm go together")
    _check(q, k, v, cos, sin, positions, kv_layer, slots)
    if q_norm is not None and k_norm is not None:
        for name, weight in (("q_norm", q_norm), ("k_norm", k_norm)):
            expect_shape(name, weight, q.shape[2:])
            expect_like(name, weight, q)
            expect(weight.is_contiguous(), f"{name} must be contiguous")
    if uses_triton(q):
        from baton.kernels.triton import rotary as triton

        triton.qk_norm_rope_and_cache(q, k, v, q_norm, k_norm, eps, cos, sin, positions, kv_layer, slots)
        return
    if q_norm is not None and k_norm is not None:
        rms_norm(q, q_norm, eps, out=q)
        rms_norm(k, k_norm, eps, out=k)
    _rope_and_cache(q, k, v, cos, sin, positions, kv_layer, slots)


def rope_and_cache(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    kv_layer: Tensor,
    slots: Tensor,
) -> None:
    """Rotate q in place, and write rotated k, and v, into the paged cache. k and v stay as they are.

    The rotation is Hugging Face's half-split `x*cos + rotate_half(x)*sin` with cos, sin and each step rounded to the
    dtype of x. Dimensions from `rot` on (partial rotary) are not rotated.

    Args:
        q: [T, Hq, D]; k, v: [T, Hk, D]; strided views of a fused projection are fine (D contiguous).
        cos, sin: fp32 [P, rot/2], contiguous, one row per position.
        positions: int32 [T], in [0, P).
        kv_layer: [num_blocks, 2, Hk, block_size, D], a view `kv[:, layer]` of the pool.
        slots: int32 or int64 [T], `block_id * block_size + offset`; negative: do not cache this row.
    """
    _check(q, k, v, cos, sin, positions, kv_layer, slots)
    if uses_triton(q):
        from baton.kernels.triton import rotary as triton

        triton.qk_norm_rope_and_cache(q, k, v, None, None, 0.0, cos, sin, positions, kv_layer, slots)
    else:
        _rope_and_cache(q, k, v, cos, sin, positions, kv_layer, slots)


def _rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_layer: Tensor, slots: Tensor
) -> None:
    if (native := library_for(q)) is not None:
        native.rope_and_cache(q, k, v, cos, sin, positions, kv_layer, slots)
    else:
        reference.rope_and_cache(q, k, v, cos, sin, positions, kv_layer, slots)


def _check(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_layer: Tensor, slots: Tensor
) -> None:
    expect(q.dim() == 3 and k.dim() == 3, f"q and k must be [T, heads, D], got {tuple(q.shape)} and {tuple(k.shape)}")
    num_rows, _, head_dim = q.shape
    expect_dtype("q", q, *DTYPES)
    expect_shape("k", k, (num_rows, k.shape[1], head_dim))
    expect_shape("v", v, k.shape)
    expect_like("k", k, q)
    expect_like("v", v, q)
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        expect_dense_rows(name, tensor)
    expect(cos.dim() == 2 and 0 < 2 * cos.shape[1] <= head_dim, f"cos must be [P, rot/2], got {tuple(cos.shape)}")
    expect_index("cos", cos, cos.shape, q.device, torch.float32)
    expect_index("sin", sin, cos.shape, q.device, torch.float32)
    expect_index("positions", positions, (num_rows,), q.device, torch.int32)
    expect_index("slots", slots, (num_rows,), q.device, torch.int32, torch.int64)
    expect_kv_layer(kv_layer, q, head_dim)
    expect(kv_layer.shape[2] == k.shape[1], f"kv_layer has {kv_layer.shape[2]} KV heads, k has {k.shape[1]}")
