"""Embedding rows: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import uses_triton
from baton.kernels.checked.arguments import (
    DTYPES,
    expect,
    expect_dense_rows,
    expect_dtype,
    expect_index,
    expect_like,
    expect_shape,
)
from baton.kernels.reference import embedding as reference

__all__ = ["embedding"]


def embedding(token_ids: Tensor, weight: Tensor, *, first_token: int = 0, out: Tensor | None = None) -> Tensor:
    """Rows of a vocabulary's embedding, or of the part of it that a rank holds.

    Args:
        token_ids: int32 or int64 [T].
        weight: [N, H], rows of tokens `first_token .. first_token + N`; the last dimension is contiguous.
        out: [T, H], dtype of weight.
    Returns:
        `out`; rows of other tokens are zero.
    """
    expect(weight.dim() == 2, f"weight must be [N, H], got {tuple(weight.shape)}")
    expect_dtype("weight", weight, *DTYPES)
    expect_dense_rows("weight", weight)
    expect(token_ids.dim() == 1, f"token_ids must be [T], got {tuple(token_ids.shape)}")
    expect_index("token_ids", token_ids, token_ids.shape, weight.device, torch.int32, torch.int64)
    expect(first_token >= 0, f"first_token must not be negative, got {first_token}")
    shape = (token_ids.shape[0], weight.shape[1])
    if out is None:
        out = torch.empty(shape, dtype=weight.dtype, device=weight.device)
    else:
        expect_shape("out", out, shape)
        expect_like("out", out, weight)
        expect_dense_rows("out", out)
    if uses_triton(weight):
        from baton.kernels.triton import embedding as triton

        triton.embedding(token_ids, weight, first_token, out)
    else:
        reference.embedding(token_ids, weight, first_token, out)
    return out
