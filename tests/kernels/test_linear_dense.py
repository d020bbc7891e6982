"""Linear layers over dense weights: against exact products, and bit-equal rows for any number of rows and threads."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baton.kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1), (7, 3), (16, 64), (33, 40), (100, 123), (31, 1000), (257, 7), (64, 2049)]  # N, K
ROWS = [1, 2, 7, 12, 13, 33, 512]


def operands(n: int, k: int, rows: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """weight [N, K], bias [N], x [rows, K]."""
    return (torch.randn(n, k) / k**0.5).to(dtype), torch.randn(n).to(dtype), torch.randn(rows, k).to(dtype)


def dirty_scratch(dtype: torch.dtype) -> None:
    """Fills what the kernels keep between calls with NaN, beyond the sizes of these tests."""
    nan = torch.full((64, 4099), float("nan")).to(dtype)
    ops.linear(nan.repeat(9, 1), ops.pack_linear(nan))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_product(any_backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    dirty_scratch(dtype)
    weight, bias, x = operands(*shape, rows=33, dtype=dtype)
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    # Half a step of the dtype, and what a chain of K sums in fp32 may lose of its terms.
    for y, expected in (
        (ops.linear(x, ops.pack_linear(weight)), exact),
        (ops.linear(x, ops.pack_linear(weight, bias)), exact + bias.double()),
    ):
        assert y.dtype is dtype
        bound = expected.abs() * torch.finfo(dtype).eps + (magnitude + 4) * shape[1] ** 0.5 * 2**-23
        assert ((y.double() - expected).abs() <= bound).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_rows_are_bit_equal_for_any_number_of_rows_and_threads(
    native: str, shape: tuple[int, int], dtype: torch.dtype
) -> None:
    dirty_scratch(dtype)
    weight, bias, x = operands(*shape, rows=530, dtype=dtype)
    packed = ops.pack_linear(weight, bias)
    expected = ops.linear(x, packed)
    for threads in (1, 2):
        ops.set_num_threads(threads)
        for rows in ROWS:
            for begin in (0, 5, 18):
                assert torch.equal(ops.linear(x[begin : begin + rows], packed), expected[begin : begin + rows])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_share_a_large_layer(native: str, dtype: torch.dtype) -> None:
    weight, bias, x = operands(3000, 700, rows=40, dtype=dtype)
    packed = ops.pack_linear(weight, bias)
    alone = ops.linear(x, packed), ops.linear(x[:1], packed)
    ops.set_num_threads(3)
    for _ in range(5):
        assert torch.equal(ops.linear(x, packed), alone[0])
        assert torch.equal(ops.linear(x[:1], packed), alone[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_operands_and_no_rows(any_backend: str, dtype: torch.dtype) -> None:
    weight, bias, x = operands(35, 50, rows=9, dtype=dtype)
    wide = torch.full((35, 60), float("nan")).to(dtype)
    wide[:, 5:55] = weight
    x_wide = torch.full((9, 57), float("nan")).to(dtype)
    x_wide[:, 3:53] = x
    packed = ops.pack_linear(wide[:, 5:55], bias)
    expected = ops.linear(x, ops.pack_linear(weight, bias))
    out = torch.full((9, 40), 7.0).to(dtype)
    y = ops.linear(x_wide[:, 3:53], packed, out[:, 2:37])
    assert torch.equal(y, expected)
    assert torch.equal(out[:, 2:37], expected)
    assert (out[:, :2] == 7).all()
    assert (out[:, 37:] == 7).all()
    assert ops.linear(x[:0], packed).shape == (0, 35)


def test_not_a_number_stays_in_its_row(native: str) -> None:
    weight, bias, x = operands(40, 33, rows=20, dtype=torch.bfloat16)
    packed = ops.pack_linear(weight, bias)
    expected = ops.linear(x, packed)
    x[7, 32], x[9, 0] = float("nan"), float("inf")
    y = ops.linear(x, packed)
    assert y[7].isnan().all()
    assert not y[9].isfinite().any()
    others = [row for row in range(20) if row not in (7, 9)]
    assert torch.equal(y[others], expected[others])


def test_large_weights_lie_in_huge_pages_of_their_own(native: str) -> None:
    weight = torch.randn(1500, 1024).bfloat16()
    packed = ops.pack_linear(weight)
    assert packed.weight.data_ptr() % (2 << 20) == 0
    weight.fill_(float("nan"))
    assert ops.linear(torch.ones(1, 1024).bfloat16(), packed).isfinite().all()


def test_wrong_operands_are_refused(any_backend: str) -> None:
    packed = ops.pack_linear(torch.randn(4, 6))
    with pytest.raises(ValueError, match=r"x must have shape \(3, 6\)"):
        ops.linear(torch.randn(3, 5), packed)
    with pytest.raises(ValueError, match="float32"):
        ops.linear(torch.randn(3, 6).bfloat16(), packed)
    with pytest.raises(ValueError, match="out must have shape"):
        ops.linear(torch.randn(3, 6), packed, torch.empty(3, 5))
    with pytest.raises(ValueError, match="bias"):
        ops.pack_linear(torch.randn(4, 6), torch.randn(5))
    with pytest.raises(ValueError, match="empty"):
        ops.pack_linear(torch.randn(0, 6))
