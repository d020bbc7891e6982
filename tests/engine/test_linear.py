"""The linear layer: right, and bit-equal rows for every batch size."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from baton.engine.linear import MAX_ROWS, Linear, kernel_error, rows_are_invariant
from baton.kernels import ops

_SHAPES = [(40, 63), (63, 40), (128, 4099), (1, 7), (17, 1), (256, 96)]
_DTYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True, params=[ops.backend(), "reference"] if ops.backend() != "reference" else ["reference"])
def _backend(request: pytest.FixtureRequest) -> Iterator[None]:
    """Our kernels where they are built, and oneDNN."""
    with ops.use_backend(request.param):
        yield


def _random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
@pytest.mark.parametrize(("in_features", "out_features"), _SHAPES)
def test_every_row_is_bit_equal_in_any_batch(in_features: int, out_features: int, dtype: torch.dtype) -> None:
    weight, bias = _random(out_features, in_features, dtype=dtype), _random(out_features, dtype=dtype, seed=1)
    linear = Linear(weight, bias)
    x = _random(2 * MAX_ROWS + 1, in_features, dtype=dtype, seed=2)
    full = linear(x)
    assert full.dtype is dtype
    for begin, size in ((0, 1), (7, 1), (0, 2), (5, 3), (1, 8), (0, 33), (100, 257), (3, MAX_ROWS), (0, MAX_ROWS + 1)):
        assert torch.equal(linear(x[begin : begin + size]), full[begin : begin + size])
    # The same layer laid out anew gives the same bits.
    assert torch.equal(Linear(weight, bias)(x[:9]), full[:9])


@pytest.mark.parametrize("dtype", _DTYPES, ids=str)
def test_result_is_the_product_rounded_to_the_dtype(dtype: torch.dtype) -> None:
    weight, bias, x = (_random(*shape, dtype=dtype, seed=shape[0]) for shape in ((33, 70), (33,), (5, 70)))
    exact = x.double() @ weight.double().T
    for linear, expected in ((Linear(weight), exact), (Linear(weight, bias), exact + bias.double())):
        torch.testing.assert_close(linear(x).double(), expected, atol=1e-4, rtol=2 * torch.finfo(dtype).eps)


def test_no_rows_and_strided_rows() -> None:
    linear = Linear(_random(6, 4, dtype=torch.float32))
    assert linear(torch.empty(0, 4)).shape == (0, 6)
    wide = _random(5, 8, dtype=torch.float32)
    assert torch.equal(linear(wide[:, :4]), linear(wide[:, :4].contiguous()))


def test_result_does_not_depend_on_the_number_of_threads() -> None:
    linear = Linear(_random(640, 256, dtype=torch.float32))
    x = _random(200, 256, dtype=torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        ops.set_num_threads(1)
        alone = linear(x)
        torch.set_num_threads(2)
        ops.set_num_threads(2)
        assert torch.equal(linear(x), alone)
    finally:
        torch.set_num_threads(threads)
        ops.set_num_threads(1)


def test_the_probe_sees_a_layer_whose_rows_depend_on_the_batch() -> None:
    class BatchDependent(Linear):
        def __call__(self, x: torch.Tensor) -> torch.Tensor:
            return super().__call__(x) + 1e-6 * x.shape[0]

    weight = _random(24, 16, dtype=torch.float32)
    assert rows_are_invariant(Linear(weight))
    assert not rows_are_invariant(BatchDependent(weight))


@pytest.mark.parametrize("quantization", ["none", "int8", "int4"])
def test_compiled_kernels_are_held_against_the_reference(quantization: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert kernel_error(torch.float32, quantization) < 1e-5  # type: ignore[arg-type]
    right = ops.linear

    def wrong(x: torch.Tensor, packed: ops.PackedLinear) -> torch.Tensor:
        y = right(x, packed)
        return y + 1.0 if packed.backend != "reference" else y

    monkeypatch.setattr(ops, "linear", wrong)
    if ops.backend() != "reference":
        assert kernel_error(torch.float32, quantization) > 1e-3  # type: ignore[arg-type]
