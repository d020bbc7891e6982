"""Norms of heads, rotation and the write of K and V in one launch, against the ops that do it one by one."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from baton.kernels import ops

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}


class Step:
    """Inputs of one call; all memory of the pool that it must not write holds NaN."""

    def __init__(
        self,
        device: torch.device,
        dtype: torch.dtype,
        *,
        rows: int,
        heads: tuple[int, int],
        dim: int,
        rotary_dims: int,
        slot_dtype: torch.dtype = torch.int64,
    ) -> None:
        q_heads, kv_heads = heads
        self.fused = torch.randn(rows, q_heads + 2 * kv_heads, dim).to(device, dtype)
        angle = torch.outer(torch.arange(200.0), 1e4 ** -(torch.arange(rotary_dims // 2) / rotary_dims))
        self.cos, self.sin = angle.cos().to(device), angle.sin().to(device)
        self.positions = torch.randint(200, (rows,), dtype=torch.int32, device=device)
        self.pool = torch.full((9, 3, 2, kv_heads, 16, dim), float("nan"), dtype=dtype, device=device)
        self.slots = torch.randperm(9 * 16)[:rows].to(device, slot_dtype)
        self.slots[rows // 2] = -1
        self.norms = [torch.randn(dim).to(device, dtype) for _ in range(2)]
        self._heads = heads

    def run(self, *, has_norms: bool) -> tuple[Tensor, Tensor]:
        """(q, pool) after the call, on copies."""
        fused, pool = self.fused.clone(), self.pool.clone()
        q, k, v = fused.split((self._heads[0], self._heads[1], self._heads[1]), dim=1)
        q_norm, k_norm = self.norms if has_norms else (None, None)
        where = (self.cos, self.sin, self.positions, pool[:, 1], self.slots)
        ops.qk_norm_rope_and_cache(q, k, v, q_norm, k_norm, 1e-6, *where)
        assert torch.equal(v, self.fused[:, -self._heads[1] :])
        return q, pool


@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "norms"])
@pytest.mark.parametrize(
    ("heads", "dim", "rotary_dims"),
    [((6, 2), 40, 16), ((5, 1), 64, 64), ((3, 3), 6, 4), ((32, 8), 128, 128), ((1, 1), 24, 2)],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_equals_the_reference(
    triton_backend: torch.device,
    dtype: torch.dtype,
    heads: tuple[int, int],
    dim: int,
    rotary_dims: int,
    has_norms: bool,
) -> None:
    step = Step(triton_backend, dtype, rows=4, heads=heads, dim=dim, rotary_dims=rotary_dims)
    q, pool = step.run(has_norms=has_norms)
    with ops.use_backend("reference"):
        expected_q, expected_pool = step.run(has_norms=has_norms)
    if has_norms:
        # Around two roundings of norms, of two numbers that are added.
        tolerance = {"atol": 4 * STEP[dtype], "rtol": 4 * STEP[dtype], "equal_nan": True}
        torch.testing.assert_close(q, expected_q, **tolerance)
        torch.testing.assert_close(pool, expected_pool, **tolerance)
    else:
        assert torch.equal(q, expected_q)
        assert torch.equal(pool.isnan(), expected_pool.isnan())
        assert torch.equal(pool.nan_to_num(), expected_pool.nan_to_num())


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
def test_rope_and_cache_is_the_same_without_norms(triton_backend: torch.device, slot_dtype: torch.dtype) -> None:
    step = Step(triton_backend, torch.bfloat16, rows=5, heads=(4, 2), dim=32, rotary_dims=32, slot_dtype=slot_dtype)
    expected_q, expected_pool = step.run(has_norms=False)
    q, k, v = step.fused.split((4, 2, 2), dim=1)
    kept = step.fused[:, 4:].clone()
    ops.rope_and_cache(q, k, v, step.cos, step.sin, step.positions, step.pool[:, 1], step.slots)
    assert torch.equal(q, expected_q)
    assert torch.equal(step.pool.nan_to_num(), expected_pool.nan_to_num())
    assert torch.equal(step.fused[:, 4:], kept), "k and v stay as they are"


def test_rows_do_not_depend_on_company(triton_backend: torch.device) -> None:
    step = Step(triton_backend, torch.bfloat16, rows=5, heads=(6, 2), dim=64, rotary_dims=32)
    q, pool = step.run(has_norms=True)
    whole, positions, slots = step.fused, step.positions, step.slots
    for row in range(5):
        step.fused, step.positions, step.slots = whole[row : row + 1], positions[row : row + 1], slots[row : row + 1]
        alone_q, alone_pool = step.run(has_norms=True)
        assert torch.equal(alone_q, q[row : row + 1])
        slot = int(step.slots)
        if slot >= 0:
            assert torch.equal(alone_pool[slot // 16, 1, :, :, slot % 16], pool[slot // 16, 1, :, :, slot % 16])


@pytest.mark.parametrize("backend", ops.available_backends())
def test_one_norm_without_the_other_is_refused(backend: str) -> None:
    q, table = torch.zeros(1, 1, 8), torch.zeros(4, 4)
    pool, one = torch.zeros(2, 2, 1, 16, 8), torch.zeros(1, dtype=torch.int32)
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match="go together"):
            ops.qk_norm_rope_and_cache(q, q, q, torch.ones(8), None, 1e-6, table, table, one, pool, one)
        with pytest.raises(ValueError, match=r"k_norm must have shape \(8,\)"):
            ops.qk_norm_rope_and_cache(q, q, q, torch.ones(8), torch.ones(7), 1e-6, table, table, one, pool, one)


@pytest.mark.parametrize("has_norms", [False, True], ids=["plain", "norms"])
def test_the_library_composes_it(native: str, has_norms: bool) -> None:
    step = Step(torch.device("cpu"), torch.bfloat16, rows=7, heads=(6, 2), dim=40, rotary_dims=16)
    q, pool = step.run(has_norms=has_norms)
    fused = step.fused.clone()
    heads = fused.split((6, 2, 2), dim=1)
    if has_norms:
        for x, weight in zip(heads, step.norms, strict=False):
            ops.rms_norm(x, weight, 1e-6, out=x)
    ops.rope_and_cache(*heads, step.cos, step.sin, step.positions, step.pool[:, 1], step.slots)
    assert torch.equal(heads[0], q)
    assert torch.equal(step.pool.nan_to_num(), pool.nan_to_num())
