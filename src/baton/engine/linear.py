"""A linear layer whose rows do not depend on the batch they are computed in.

On CPU the compiled kernels multiply (`ops.linear`), with the weight laid out for them once. Where none run, the weight
is reordered into oneDNN's blocked layout and multiplied by oneDNN. Measured with torch 2.13 (oneDNN 3.12): every row is
bit-equal for any number of rows from 2 on, at any place in the batch, with 1 or 2 threads: AVX-512 with bf16 and fp32
for 2..512 rows; AVX2 with fp32 for 1..4096 rows and layers from 1x7 to 4099x128. Only a single row may be computed in
another order, so one row is padded to two; more than `MAX_ROWS` rows are cut into pieces, so that no size beyond what
was measured ever reaches oneDNN. `rows_are_invariant` checks the claim where Baton runs, for either.

Where the processor has no arithmetic for bf16 or fp16, our kernels widen weights in registers, and the layer of oneDNN
keeps its weight in fp32, multiplies in fp32 and rounds the result to the dtype: right and invariant too, at the price
of twice the memory.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from baton.kernels import ops

__all__ = ["MAX_ROWS", "Embedding", "Linear", "LinearLike", "has_native_matmul", "kernel_error", "rows_are_invariant"]

MAX_ROWS = 512
_MIN_ROWS = 2
_PROBE_ROWS = 33
_GROUP: dict[ops.Quantization, int] = {"none": 128, "int8": 128, "int4": 64}
"""Input features that share a scale: 0.125 bits per weight for int8, 0.25 for int4."""


def has_native_matmul(dtype: torch.dtype) -> bool:
    """Whether oneDNN multiplies `dtype` on this processor without going through fp32."""
    if dtype is torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    if dtype is torch.float16:
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return dtype is torch.float32


class LinearLike(Protocol):
    """What a model calls: a `Linear`, or one with an exchange between ranks around it (`parallel.py`)."""

    in_features: int
    out_features: int
    dtype: torch.dtype

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [M, K] -> [M, N]."""
        ...


class Embedding:
    """Rows of `weight` [vocabulary, H] by token id."""

    def __init__(self, weight: Tensor) -> None:
        self.weight = weight

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        return torch.nn.functional.embedding(token_ids, self.weight)


class Linear:
    """`x @ weight.T + bias`, with the weight owned and laid out for speed.

    Attributes:
        in_features, out_features: K and N.
        dtype: of input and output.
        packed: what `ops.linear` reads; None where torch multiplies.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None, *, quantization: ops.Quantization = "none") -> None:
        """
        Args:
            weight: [N, K]; on CPU it is copied into another layout and can be freed afterwards.
            bias: [N], dtype and device of `weight`.
            quantization: how the weight is stored; other than "none" on CPU only.
        """
        self.out_features, self.in_features = weight.shape
        self.dtype = weight.dtype
        is_ours = weight.is_cpu and (quantization != "none" or ops.backend() != "reference")
        assert is_ours or quantization == "none", "integer weights are for the CPU"
        self.packed = (
            ops.pack_linear(weight, bias, quantization=quantization, group=_GROUP[quantization]) if is_ours else None
        )
        self._fallback = None if self.packed is not None else _TorchLinear(weight, bias)

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [M, K] (any M, also 0) -> [M, N]."""
        if self.packed is not None:
            return ops.linear(x, self.packed)
        assert self._fallback is not None
        return self._fallback(x)


class _TorchLinear:
    """The same through torch: oneDNN on CPU, whatever torch has elsewhere."""

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        self._dtype = weight.dtype
        self._is_cpu = weight.device.type == "cpu"
        self._compute_dtype = weight.dtype if not self._is_cpu or has_native_matmul(weight.dtype) else torch.float32
        self._bias = None if bias is None else bias.to(self._compute_dtype)
        self._out_features = weight.shape[0]
        weight = weight.to(self._compute_dtype)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_cpu else weight

    def __call__(self, x: Tensor) -> Tensor:
        if not self._is_cpu:
            return torch.nn.functional.linear(x, self._weight, self._bias)
        num_rows = x.shape[0]
        if _MIN_ROWS <= num_rows <= MAX_ROWS:
            return self._multiply(x)
        if num_rows == 1:
            return self._multiply(x.expand(_MIN_ROWS, -1))[:1]
        out = torch.empty((num_rows, self._out_features), dtype=self._dtype)
        for begin in range(0, num_rows, MAX_ROWS):
            out[begin : begin + MAX_ROWS] = self(x[begin : begin + MAX_ROWS])
        return out

    def _multiply(self, x: Tensor) -> Tensor:
        # `reshape` would keep the zero stride of an expanded row; oneDNN wants dense rows.
        x = x.to(self._compute_dtype).contiguous()
        y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
        return y.to(self._dtype)


@torch.inference_mode()
def rows_are_invariant(linear: LinearLike, *, max_rows: int = _PROBE_ROWS) -> bool:
    """Whether rows of `linear` come out bit-equal for several batch sizes up to `max_rows` (CPU). Takes milliseconds.

    The first rows are compared for each size, and also when they stand at another place in the batch.
    """
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((max_rows, linear.in_features), generator=generator).to(linear.dtype)
    expected = linear(x)
    sizes = [size for size in (1, 2, 3, 4, 5, 8, 16, 17, 32) if size < max_rows]
    return all(
        torch.equal(linear(x[:size]), expected[:size]) and torch.equal(linear(x[-size:]), expected[-size:])
        for size in sizes
    )


@torch.inference_mode()
def kernel_error(dtype: torch.dtype, quantization: ops.Quantization = "none") -> float:
    """By how much the active backend's linear layers differ from the reference's, as a part of the largest output.

    A packed weight stays with the backend that packed it, so this packs a small one of odd sizes twice. Milliseconds.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn((67, 150), generator=generator).to(dtype)
    x = torch.randn((_PROBE_ROWS, 150), generator=generator).to(dtype)
    group = _GROUP[quantization]
    mine = ops.pack_linear(weight, quantization=quantization, group=group)
    with ops.use_backend("reference"):
        theirs = ops.pack_linear(weight, quantization=quantization, group=group)
    expected = ops.linear(x, theirs).float()
    largest = max(
        float((ops.linear(x[:size], mine).float() - expected[:size]).abs().max()) for size in (1, 7, _PROBE_ROWS)
    )
    return largest / float(expected.abs().max())
