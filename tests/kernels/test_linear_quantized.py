"""Linear layers over int8 and int4 weights: rounding, products against the reference's numbers, bit-equal rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baton.kernels import ops
from baton.kernels.packed_linear import Quantization
from baton.kernels.reference import linear as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
QUANTIZATIONS: list[Quantization] = ["int8", "int4"]
SHAPES = [(1, 1, 128), (7, 3, 8), (33, 40, 32), (100, 123, 32), (31, 1000, 128), (65, 2051, 64)]  # N, K, group


def operands(n: int, k: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K], bias [N], x [rows, K]."""
    return (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype), torch.randn(rows, k).to(dtype)


def dirty_scratch(dtype: torch.dtype, quantization: Quantization) -> None:
    """Fills what the kernels keep between calls with NaN and large numbers, beyond the sizes of these tests."""
    x = torch.full((40, 4099), float("nan")).to(dtype)
    ops.linear(x, ops.pack_linear(torch.full((40, 4099), 1e3).to(dtype), quantization=quantization))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("group", [8, 128])
def test_weights_are_rounded_to_the_nearest_multiple(quantization: Quantization, group: int) -> None:
    weight = torch.randn(33, 300).bfloat16()
    weight[3] = 0.0
    integers, scales = reference.quantize(weight, quantization, group)
    assert scales.shape == (33, -(-300 // group))
    assert scales.dtype is torch.bfloat16
    low, high = (-127, 127) if quantization == "int8" else (-8, 7)
    assert low <= int(integers.min()) <= int(integers.max()) <= high
    assert (integers[3] == 0).all()
    step = scales.float().abs().repeat_interleave(group, 1)[:, :300]
    error = (reference.dequantize(integers, scales, group) - weight.float()).abs()
    # int4 has no 8: there a weight opposite to the largest may lose a whole step; bf16 scales add a little.
    assert (error <= step * (0.51 if quantization == "int8" else 1.04)).all()
    assert error.norm() < weight.float().norm() * (0.01 if quantization == "int8" else 0.12)


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(any_backend: str, shape: tuple[int, int, int], dtype: torch.dtype, quantization: Quantization) -> None:
    n, k, group = shape
    dirty_scratch(dtype, quantization)
    weight, bias, x = operands(n, k, rows=33, dtype=dtype)
    stored = reference.dequantize(*reference.quantize(weight, quantization, group), group).double()
    expected, magnitude = x.double() @ stored.T + bias.double(), x.double().abs() @ stored.abs().T
    packed = ops.pack_linear(weight, bias, quantization=quantization, group=group)
    for rows in (33, 3):
        y = ops.linear(x[:rows], packed)
        assert y.dtype is dtype
        bound = expected.abs() * torch.finfo(dtype).eps + (magnitude + 4) * k**0.5 * 2**-23
        assert ((y.double() - expected[:rows]).abs() <= bound[:rows]).all()


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_bit_equal_for_any_number_of_rows_and_threads(
    native: str, shape: tuple[int, int, int], dtype: torch.dtype, quantization: Quantization
) -> None:
    n, k, group = shape
    dirty_scratch(dtype, quantization)
    weight, bias, x = operands(n, k, rows=530, dtype=dtype)
    packed = ops.pack_linear(weight, bias, quantization=quantization, group=group)
    expected = ops.linear(x, packed)
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for rows in (1, 2, 7, 12, 13, 33, 512):
            for begin in (0, 18):
                assert torch.equal(ops.linear(x[begin : begin + rows], packed), expected[begin : begin + rows])


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
def test_threads_share_a_large_layer(native: str, quantization: Quantization) -> None:
    weight, bias, x = operands(3000, 700, rows=40, dtype=torch.bfloat16)
    packed = ops.pack_linear(weight, bias, quantization=quantization)
    alone = ops.linear(x, packed), ops.linear(x[:1], packed)
    ops.set_num_threads(3)
    for _ in range(5):
        assert torch.equal(ops.linear(x, packed), alone[0])
        assert torch.equal(ops.linear(x[:1], packed), alone[1])


def test_packed_weights_take_fewer_bytes(native: str) -> None:
    weight = torch.randn(256, 1024).bfloat16()
    num_bytes = {name: ops.pack_linear(weight, quantization=name).weight.numel() for name in ("none", *QUANTIZATIONS)}
    assert num_bytes == {"none": 2 * 256 * 1024, "int8": 256 * 1024, "int4": 256 * 1024 // 2}


def test_wrong_settings_are_refused(any_backend: str) -> None:
    weight = torch.randn(4, 16)
    with pytest.raises(ValueError, match="int3"):
        ops.pack_linear(weight, quantization="int3")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="multiple of 8, got 12"):
        ops.pack_linear(weight, quantization="int4", group=12)
