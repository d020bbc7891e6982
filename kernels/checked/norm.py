"""RMS norm: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import DTYPES, expect, expect_dense_rows, expect_dtype, expect_like, expect_shape
from baton.kernels.reference import norm as reference

__all__ = ["rms_norm"]


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, out: Tensor | None = None
) -> Tensor:
    """RMS norm over the last dimension, as Hugging Face's `LlamaRMSNorm` rounds it.

    Args:
        x: [T, H], or [T, heads, D] for a norm per head; may be a strided view (the last dimension is contiguous).
        weight: [H] or [D], dtype of x.
        residual: [T, H]; `residual += x` (rounded to the dtype) happens in place, and the sum is normed.
        out: like x; may be x itself.
    Returns:
        `out`, shape and dtype of x.
    """
    expect(x.dim() in (2, 3), f"x must have 2 or 3 dimensions, got {x.dim()}")
    expect_dtype("x", x, *DTYPES)
    expect_dense_rows("x", x)
    expect_shape("weight", weight, x.shape[-1:])
    expect_like("weight", weight, x)
    expect(weight.is_contiguous(), "weight must be contiguous")
    if residual is not None:
        expect(x.dim() == 2, "residual goes with x of 2 dimensions only")
        expect_shape("residual", residual, x.shape)
        expect_like("residual", residual, x)
        expect_dense_rows("residual", residual)
    if out is None:
        out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    else:
        expect_shape("out", out, x.shape)
        expect_like("out", out, x)
        expect_dense_rows("out", out)
    if uses_triton(x):
        from baton.kernels.triton import norm as triton

        triton.rms_norm(x, weight, eps, residual, out)
    elif (native := library_for(x)) is not None:
        native.rms_norm(x, weight, eps, residual, out)
    else:
        reference.rms_norm(x, weight, eps, residual, out)
    return out
