"""Norm, gated activation and rotary embedding: against Hugging Face's arithmetic, and row-invariance."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baton.kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One step of the dtype: a sum in another order may tip a rounding.
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


def hugging_face_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x_fp32 = x.float()
    return weight * (x_fp32 * torch.rsqrt(x_fp32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def hugging_face_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, heads, rot]; cos, sin fp32 [T, rot/2]."""
    full_cos, full_sin = (torch.cat((t, t), -1).to(x.dtype).unsqueeze(1) for t in (cos, sin))
    first, second = x.chunk(2, -1)
    return x * full_cos + torch.cat((-second, first), -1) * full_sin


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 64), (1, 5), (123, 100), (2, 4097)], ids=str)
def test_rms_norm(any_backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, residual = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    weight = torch.randn(shape[1]).to(dtype)
    expected = hugging_face_norm(x, weight, 1e-5)
    torch.testing.assert_close(ops.rms_norm(x, weight, 1e-5), expected, atol=1e-6, rtol=2 * STEP[dtype])
    total = x + residual
    normed = ops.rms_norm(x, weight, 1e-5, residual=residual)
    assert torch.equal(residual, total)
    torch.testing.assert_close(normed, hugging_face_norm(total, weight, 1e-5), atol=1e-6, rtol=2 * STEP[dtype])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_per_head_of_a_fused_row_in_place(any_backend: str, dtype: torch.dtype) -> None:
    fused = torch.randn(17, 7 * 40).to(dtype)
    weight = torch.randn(40).to(dtype)
    q, rest = fused[:, : 5 * 40].unflatten(1, (5, 40)), fused[:, 5 * 40 :].clone()
    expected = hugging_face_norm(q, weight, 1e-6)
    assert ops.rms_norm(q, weight, 1e-6, out=q) is q
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=2 * STEP[dtype])
    assert torch.equal(fused[:, 5 * 40 :], rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(63, 64), (1, 3), (100, 123)], ids=str)
def test_silu_mul(any_backend: str, shape: tuple[int, int], dtype: torch.dtype) -> None:
    gate, up = (3 * torch.randn(shape)).to(dtype), torch.randn(shape).to(dtype)
    expected = torch.nn.functional.silu(gate) * up
    actual = ops.silu_mul(torch.cat((gate, up), 1))
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=2 * STEP[dtype])


def test_silu_of_extreme_gates(native: str) -> None:
    gate = torch.tensor([[-200.0, -80.0, 0.0, 80.0, 1e30, -1e30, float("nan")]])
    actual = ops.silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))[0]
    torch.testing.assert_close(actual[:5], torch.nn.functional.silu(gate[0, :5]), atol=1e-30, rtol=1e-5)
    assert abs(float(actual[5])) < 1e-5
    assert actual[6].isnan()


@pytest.mark.parametrize("index_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("rotary_dims", [40, 16])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rope_and_cache(any_backend: str, dtype: torch.dtype, rotary_dims: int, index_dtype: torch.dtype) -> None:
    rows, q_heads, kv_heads, dim, block_size = 63, 6, 2, 40, 16
    fused = torch.randn(rows, q_heads + 2 * kv_heads, dim).to(dtype)
    before = fused.clone()
    q, k, v = fused.split((q_heads, kv_heads, kv_heads), dim=1)
    angle = torch.outer(torch.arange(200.0), 1e4 ** -(torch.arange(rotary_dims // 2) / rotary_dims))
    cos, sin = angle.cos(), angle.sin()
    positions = torch.randint(200, (rows,), dtype=torch.int32)
    pool = torch.full((9, 3, 2, kv_heads, block_size, dim), float("nan"), dtype=dtype)
    slots = torch.randperm(9 * block_size)[:rows].to(index_dtype)
    slots[5] = -1
    ops.rope_and_cache(q, k, v, cos, sin, positions, pool[:, 1], slots)

    expected = before.clone()
    rotated = expected[:, : q_heads + kv_heads, :rotary_dims]
    rotated.copy_(hugging_face_rope(rotated, cos[positions.long()], sin[positions.long()]))
    assert torch.equal(fused[:, :q_heads], expected[:, :q_heads])
    assert torch.equal(fused[:, q_heads:], before[:, q_heads:]), "k and v stay as they are"
    for row, slot in enumerate(slots.tolist()):
        if slot >= 0:
            page = pool[slot // block_size, 1, :, :, slot % block_size]
            assert torch.equal(page[0], expected[row, q_heads : q_heads + kv_heads])
            assert torch.equal(page[1], expected[row, q_heads + kv_heads :])
    assert pool[:, 0].isnan().all()
    assert pool[:, 2].isnan().all()
    assert int((~pool[:, 1].isnan()).sum()) == (rows - 1) * 2 * kv_heads * dim


@pytest.mark.parametrize(("position", "slot", "message"), [(8, 0, "positions"), (-1, 0, "positions"), (0, 32, "slots")])
def test_rope_refuses_bad_indices(native: str, position: int, slot: int, message: str) -> None:
    x, table = torch.ones(1, 1, 8), torch.ones(8, 4)
    pool = torch.zeros(2, 2, 1, 16, 8)
    positions, slots = torch.tensor([position], dtype=torch.int32), torch.tensor([slot])
    with pytest.raises(ValueError, match=message):
        ops.rope_and_cache(x, x.clone(), x.clone(), table, table, positions, pool, slots)
    assert torch.equal(x, torch.ones(1, 1, 8))
    assert not pool.any()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_company(native: str, dtype: torch.dtype, threads: int) -> None:
    x, weight = torch.randn(123, 1026).to(dtype), torch.randn(1026).to(dtype)
    residual = torch.randn(123, 1026).to(dtype)
    normed = [ops.rms_norm(x[i : i + 1], weight, 1e-5, residual=residual[i : i + 1].clone()) for i in range(123)]
    gated = [ops.silu_mul(x[i : i + 1]) for i in range(123)]
    ops.set_num_threads(threads)
    assert torch.equal(ops.silu_mul(x), torch.cat(gated))
    assert torch.equal(ops.rms_norm(x, weight, 1e-5, residual=residual), torch.cat(normed))


def test_bad_arguments_are_refused() -> None:
    x = torch.ones(3, 8)
    with pytest.raises(ValueError, match=r"weight must have shape \(8,\), got \(7,\)"):
        ops.rms_norm(x, torch.ones(7), 1e-5)
    with pytest.raises(ValueError, match="bfloat16"):
        ops.rms_norm(x.bfloat16(), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="contiguous"):
        ops.rms_norm(torch.ones(8, 3).t(), torch.ones(8), 1e-5)
    with pytest.raises(ValueError, match="residual"):
        ops.rms_norm(x, torch.ones(8), 1e-5, residual=torch.ones(2, 8))
    with pytest.raises(ValueError, match="gate_up"):
        ops.silu_mul(torch.ones(3, 7))
    with pytest.raises(ValueError, match="float64"):
        ops.silu_mul(torch.ones(3, 8).double())
