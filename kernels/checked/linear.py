"""Linear layers and whole decoder layers on CPU: checks, then the backend."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from baton.kernels.backends import REFERENCE, cpu_library
from baton.kernels.checked.arguments import DTYPES, expect, expect_dense_rows, expect_dtype, expect_like, expect_shape
from baton.kernels.cpu import library
from baton.kernels.decoder import Decoder, DecoderLayer, DecoderShape
from baton.kernels.packed_linear import PackedLinear, Quantization
from baton.kernels.reference import linear as reference

__all__ = ["decoder", "linear", "pack_linear"]


def pack_linear(
    weight: Tensor, bias: Tensor | None = None, *, quantization: Quantization = "none", group: int = 128
) -> PackedLinear:
    """Lay out the weight of a linear layer for `linear` with the active backend.

    Args:
        weight: [N, K] on CPU; the last dimension is contiguous. It is copied and can be freed afterwards.
        bias: [N], dtype of `weight`, contiguous; it is kept.
        quantization: "int8" or "int4" rounds weights to integers, as `reference/linear.py` spells out.
        group: how many input features share a scale, a multiple of 8; means nothing without quantization.
    """
    expect(weight.dim() == 2 and weight.is_cpu, f"weight must be [N, K] on CPU, got {tuple(weight.shape)}")
    expect(min(weight.shape) >= 1, f"weight must not be empty, got {tuple(weight.shape)}")
    expect_dtype("weight", weight, *DTYPES)
    expect_dense_rows("weight", weight)
    expect(quantization in ("none", "int8", "int4"), f"quantization must be none, int8 or int4, got {quantization!r}")
    expect(group >= 8 and group % 8 == 0, f"group must be a positive multiple of 8, got {group}")
    if bias is not None:
        expect_shape("bias", bias, weight.shape[:1])
        expect_like("bias", bias, weight)
        expect(bias.is_contiguous(), "bias must be contiguous")
    if quantization == "none":
        group = 0
    if (native := cpu_library()) is not None:
        return native.pack_linear(weight, bias, quantization, group)
    return reference.pack_linear(weight, bias, quantization, group)


def linear(x: Tensor, packed: PackedLinear, out: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`, summed in fp32 and rounded once.

    Args:
        x: [T, K], dtype of the weight; may be a strided view (the last dimension is contiguous).
        packed: of `pack_linear`; the backend that packed it multiplies, whichever is active now.
        out: [T, N]; the last dimension is contiguous.
    Returns:
        `out`.
    """
    expect(x.dim() == 2 and x.is_cpu, f"x must be [T, K] on CPU, got {tuple(x.shape)} on {x.device}")
    expect_shape("x", x, (x.shape[0], packed.in_features))
    expect_dtype("x", x, packed.dtype)
    expect_dense_rows("x", x)
    shape = (x.shape[0], packed.out_features)
    if out is None:
        out = torch.empty(shape, dtype=x.dtype)
    else:
        expect_shape("out", out, shape)
        expect_like("out", out, x)
        expect_dense_rows("out", out)
    if packed.backend != REFERENCE:
        library.load(packed.backend).linear(x, packed, out)
    else:
        reference.linear(x, packed, out)
    return out


def decoder(
    shape: DecoderShape,
    layers: Sequence[DecoderLayer],
    cos: Tensor,
    sin: Tensor,
    *,
    embed: Tensor | None,
    final_norm: Tensor | None,
    head: PackedLinear | None,
    max_rows: int,
    max_logit_rows: int,
) -> Decoder | None:
    """Decoder layers as one call of the library: see `Decoder`. None where these weights were not packed by it."""
    weights = [weight for layer in layers for weight in (layer.qkv, layer.o, layer.gate_up, layer.down)]
    if head is not None:
        weights.append(head)
    native = cpu_library()
    if native is None or any(weight.native is None or weight.backend != native.name for weight in weights):
        return None
    return Decoder(
        native,
        shape,
        layers,
        cos,
        sin,
        embed=embed,
        final_norm=final_norm,
        head=head,
        max_rows=max_rows,
        max_logit_rows=max_logit_rows,
    )
