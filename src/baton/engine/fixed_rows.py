"""Linear layers whose rows do not depend on the batch on a GPU, by multiplying the same number of rows every time.

cuBLAS picks another kernel for another number of rows, and so another order of summation. Here rows are cut into pieces
of `FIXED_ROWS`, the last filled up with zeros, so that one kernel computes everything. That a row gives the same bits
at every place of a piece is how matrix products are computed, not what anybody promises: `rows_are_fixed` looks. The
price is compute for rows that nobody reads in small steps, and weights that are read once per piece in large ones.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from baton.engine.linear import LinearLike
from baton.engine.weights import ModelWeights

__all__ = ["FIXED_ROWS", "FixedRowsLinear", "fix_rows", "rows_are_fixed"]

FIXED_ROWS = 128
"""As many rows as take about as long to multiply as the weight takes to read, on a GPU of 2022 or later."""


class FixedRowsLinear:
    """`local`, always called with `num_rows` rows."""

    def __init__(self, local: LinearLike, num_rows: int = FIXED_ROWS) -> None:
        self.in_features = local.in_features
        self.out_features = local.out_features
        self.dtype = local.dtype
        self.local = local
        self._num_rows = num_rows

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [M, K] -> [M, N]."""
        count, size = x.shape[0], self._num_rows
        if count == size:
            return self.local(x.contiguous())
        if count < size:
            return self.local(torch.nn.functional.pad(x, (0, 0, 0, size - count)))[:count]
        return torch.cat([self(x[begin : begin + size]) for begin in range(0, count, size)])


def fix_rows(weights: ModelWeights, num_rows: int = FIXED_ROWS) -> ModelWeights:
    """`weights` with every linear layer computed so."""

    def fixed(linear: LinearLike) -> LinearLike:
        return FixedRowsLinear(linear, num_rows)

    layers = tuple(
        replace(
            layer,
            qkv=fixed(layer.qkv),
            o=fixed(layer.o),
            gate_up=fixed(layer.gate_up),
            down=fixed(layer.down),
        )
        for layer in weights.layers
    )
    head = weights.lm_head
    return replace(weights, layers=layers, lm_head=None if head is None else fixed(head))


@torch.inference_mode()
def rows_are_fixed(linear: LinearLike, device: torch.device, num_rows: int = FIXED_ROWS) -> bool:
    """Whether rows of `linear` come out bit-equal at every place and in any company. Takes milliseconds."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((num_rows + 5, linear.in_features), generator=generator).to(device, linear.dtype)
    expected = linear(x)
    for count in (1, 2, 7, num_rows // 2 + 1, num_rows):
        if not torch.equal(linear(x[:count]), expected[:count]):
            return False
        if not torch.equal(linear(x[-count:]), expected[-count:]):
            return False
    return all(torch.equal(linear(x.roll(shift, 0)).roll(-shift, 0), expected) for shift in (1, 16, num_rows // 2 + 3))
