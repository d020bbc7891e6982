"""Gated activation: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import DTYPES, expect, expect_dense_rows, expect_dtype, expect_like, expect_shape
from baton.kernels.reference import activation as reference

__all__ = ["silu_mul"]


def silu_mul(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """`silu(gate) * up`, each rounded to the dtype.

    Args:
        gate_up: [T, 2*I], gate in the first half; the last dimension is contiguous.
        out: [T, I].
    """
    expect(gate_up.dim() == 2 and gate_up.shape[1] % 2 == 0, f"gate_up must be [T, 2*I], got {tuple(gate_up.shape)}")
    expect_dtype("gate_up", gate_up, *DTYPES)
    expect_dense_rows("gate_up", gate_up)
    shape = (gate_up.shape[0], gate_up.shape[1] // 2)
    if out is None:
        out = torch.empty(shape, dtype=gate_up.dtype, device=gate_up.device)
    else:
        expect_shape("out", out, shape)
        expect_like("out", out, gate_up)
        expect_dense_rows("out", out)
    if uses_triton(gate_up):
        from baton.kernels.triton import activation as triton

        triton.silu_mul(gate_up, out)
    elif (native := library_for(gate_up)) is not None:
        native.silu_mul(gate_up, out)
    else:
        reference.silu_mul(gate_up, out)
    return out
