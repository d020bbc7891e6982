"""Linear layers in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.packed_linear import PackedLinear

__all__ = ["linear", "pack_linear"]


def pack_linear(weight: Tensor, bias: Tensor | None) -> PackedLinear:
    """See `ops.pack_linear`; a copy."""
    return PackedLinear(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=weight.dtype,
        backend="reference",
        weight=weight.contiguous().clone(),
        bias=bias,
        native=None,
    )


def linear(x: Tensor, packed: PackedLinear, out: Tensor) -> None:
    """See `ops.linear`."""
    y = x.float().contiguous() @ packed.weight.float().T
    out.copy_(y if packed.bias is None else torch.add(y, packed.bias.float()))
