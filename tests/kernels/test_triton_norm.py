"""Norm, gated activation and embedding of the Triton backend against the reference, odd shapes and strided views."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
# One step of the dtype: a sum in another order may tip a rounding.
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 64), (1, 5), (63, 64), (123, 100), (17, 128), (2, 4097)], ids=str)
def test_rms_norm(triton_backend: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(triton_backend, dtype), torch.randn(shape[1]).to(triton_backend, dtype)
    residual = torch.randn(shape).to(triton_backend, dtype)
    mine, theirs = residual.clone(), residual.clone()
    plain, added = ops.rms_norm(x, weight, 1e-5), ops.rms_norm(x, weight, 1e-5, residual=mine)
    with ops.use_backend("reference"):
        torch.testing.assert_close(plain, ops.rms_norm(x, weight, 1e-5), atol=1e-6, rtol=2 * STEP[dtype])
        expected = ops.rms_norm(x, weight, 1e-5, residual=theirs)
    torch.testing.assert_close(added, expected, atol=1e-6, rtol=2 * STEP[dtype])
    assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rms_norm_per_head_of_a_fused_row_in_place(triton_backend: torch.device, dtype: torch.dtype) -> None:
    fused = torch.randn(17, 7 * 40).to(triton_backend, dtype)
    weight = torch.randn(40).to(triton_backend, dtype)
    q, rest = fused[:, : 5 * 40].unflatten(1, (5, 40)), fused[:, 5 * 40 :].clone()
    with ops.use_backend("reference"):
        expected = ops.rms_norm(q, weight, 1e-6)
    assert ops.rms_norm(q, weight, 1e-6, out=q) is q
    torch.testing.assert_close(q, expected, atol=1e-6, rtol=2 * STEP[dtype])
    assert torch.equal(fused[:, 5 * 40 :], rest)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_do_not_depend_on_company(triton_backend: torch.device, dtype: torch.dtype) -> None:
    for width in (128, 1026):
        x = torch.randn(11, width).to(triton_backend, dtype)
        weight, residual = torch.randn(width).to(triton_backend, dtype), torch.randn_like(x)
        alone = [ops.rms_norm(x[i : i + 1], weight, 1e-5, residual=residual[i : i + 1].clone()) for i in range(11)]
        assert torch.equal(ops.rms_norm(x, weight, 1e-5, residual=residual.clone()), torch.cat(alone))


def test_rows_that_do_not_fit_are_refused(triton_backend: torch.device) -> None:
    x = torch.ones(1, 65537, device=triton_backend)
    with pytest.raises(ValueError, match=r"up to 65536 elements, got 65537"):
        ops.rms_norm(x, x[0], 1e-5)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", [(0, 8), (63, 64), (1, 3), (100, 123), (3, 1100)], ids=str)
def test_silu_mul(triton_backend: torch.device, shape: tuple[int, int], dtype: torch.dtype) -> None:
    wide = (3 * torch.randn(shape[0], 2 * shape[1] + 3)).to(triton_backend, dtype)
    gate_up = wide[:, : 2 * shape[1]]
    with ops.use_backend("reference"):
        expected = ops.silu_mul(gate_up)
    torch.testing.assert_close(ops.silu_mul(gate_up), expected, atol=1e-6, rtol=2 * STEP[dtype])


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
def test_silu_of_extreme_gates(triton_backend: torch.device) -> None:
    gate = torch.tensor([[-200.0, -80.0, 0.0, 80.0, 1e30, -1e30, float("nan")]], device=triton_backend)
    actual = ops.silu_mul(torch.cat((gate, torch.ones_like(gate)), 1))[0]
    torch.testing.assert_close(actual[:5], torch.nn.functional.silu(gate[0, :5]), atol=1e-30, rtol=1e-5)
    assert abs(float(actual[5])) < 1e-5
    assert actual[6].isnan()


@pytest.mark.parametrize("index", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("hidden", [5, 64, 1100])
def test_embedding_of_a_shard(
    triton_backend: torch.device, hidden: int, dtype: torch.dtype, index: torch.dtype
) -> None:
    weight = torch.randn(40, hidden + 3).to(triton_backend, dtype)[:, :hidden]
    token_ids = torch.tensor([0, 100, 139, 140, 99, 2**30, 120], dtype=index, device=triton_backend)
    rows = ops.embedding(token_ids, weight, first_token=100)
    assert not rows[[0, 3, 4, 5]].any()
    assert torch.equal(rows[[1, 2, 6]], weight[[0, 39, 20]])
    for backend in ("reference", "triton"):
        with ops.use_backend(backend):
            assert torch.equal(ops.embedding(token_ids, weight, first_token=100), rows)
            assert torch.equal(ops.embedding(token_ids[:0], weight), rows[:0])


def test_bad_arguments_of_embedding_are_refused() -> None:
    weight = torch.zeros(4, 8)
    with pytest.raises(ValueError, match="token_ids"):
        ops.embedding(torch.zeros(3), weight)
    with pytest.raises(ValueError, match=r"out must have shape \(2, 8\)"):
        ops.embedding(torch.tensor([1, 2]), weight, out=torch.zeros(2, 7))
    with pytest.raises(ValueError, match="first_token"):
        ops.embedding(torch.tensor([1, 2]), weight, first_token=-1)
