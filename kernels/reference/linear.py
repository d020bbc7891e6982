"""Linear layers and the quantization of their weights in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.packed_linear import PackedLinear, Quantization

__all__ = ["dequantize", "linear", "pack_linear", "quantize"]

_ROWS_PER_PIECE = 256
"""Pieces of the weight stay in the cache while they are rounded."""


def quantize(weight: Tensor, quantization: Quantization, group: int) -> tuple[Tensor, Tensor]:
    """Round weights to integers, group by group along K; the last group may be shorter.

    int8 runs from -127 to 127, zero in the middle. int4 runs from -8 to 7, and the scale's sign makes -8 the largest
    weight of its group. Scales are rounded to bf16 first, weights to the nearest multiple of them, ties to even.

    Args:
        weight: [N, K].
    Returns:
        integers int8 [N, K] and scales bf16 [N, ceil(K / group)].
    """
    n, k = weight.shape
    num_groups = -(-k // group)
    integers = torch.empty((n, k), dtype=torch.int8)
    scales = torch.empty((n, num_groups), dtype=torch.bfloat16)
    for begin in range(0, n, _ROWS_PER_PIECE):
        rows = slice(begin, begin + _ROWS_PER_PIECE)
        piece = torch.nn.functional.pad(weight[rows].float(), (0, num_groups * group - k)).unflatten(1, (-1, group))
        largest = piece.gather(2, piece.abs().argmax(2, keepdim=True))
        scale = (largest.abs() / 127 if quantization == "int8" else largest / -8).bfloat16().float()
        scale = scale.masked_fill_(scale == 0, 1.0)
        low, high = (-127, 127) if quantization == "int8" else (-8, 7)
        rounded = (piece / scale).round_().clamp_(low, high).flatten(1)[:, :k]
        integers[rows] = rounded.to(torch.int8)
        scales[rows] = scale.squeeze(2).bfloat16()
    return integers, scales


def dequantize(integers: Tensor, scales: Tensor, group: int) -> Tensor:
    """The weights, fp32 [N, K], that integers [N, K] and scales [N, groups] stand for."""
    return integers.float() * scales.float().repeat_interleave(group, 1)[:, : integers.shape[1]]


def pack_linear(weight: Tensor, bias: Tensor | None, quantization: Quantization, group: int) -> PackedLinear:
    """See `ops.pack_linear`; a copy."""
    stored, scales = weight.contiguous().clone(), None
    if quantization != "none":
        stored, scales = quantize(weight, quantization, group)
    return PackedLinear(
        out_features=weight.shape[0],
        in_features=weight.shape[1],
        dtype=weight.dtype,
        quantization=quantization,
        group=group,
        backend="reference",
        weight=stored,
        scales=scales,
        bias=bias,
        native=None,
    )


def linear(x: Tensor, packed: PackedLinear, out: Tensor) -> None:
    """See `ops.linear`."""
    weight = packed.weight.float()
    if packed.scales is not None:
        weight = dequantize(packed.weight, packed.scales, packed.group)
    y = x.float().contiguous() @ weight.T
    out.copy_(y if packed.bias is None else torch.add(y, packed.bias.float()))
