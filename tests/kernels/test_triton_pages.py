"""Checksum, block copies and copies between pages and buffers of the Triton backend: equal to the reference."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import ops

KNOWN_CHECKSUM = 13221920741124930643


def as_unsigned(bits: torch.Tensor) -> int:
    return int(bits) % (1 << 64)


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 63, 64, 100, 4096, 16384, 100_003])
def test_checksum_is_that_of_the_reference(triton_backend: torch.device, num_bytes: int) -> None:
    data = torch.randint(256, (num_bytes + 3,), dtype=torch.uint8).to(triton_backend)
    out = torch.empty(1, dtype=torch.int64, device=triton_backend)
    for view in (data[:num_bytes], data[3:]):
        ops.checksum_into(view, out)
        assert as_unsigned(out) == ops.checksum(view)
        with ops.use_backend("reference"):
            assert as_unsigned(out) == ops.checksum(view)
            ops.checksum_into(view, out)
            assert as_unsigned(out) == ops.checksum(view)


def test_checksum_never_changes_between_versions(triton_backend: torch.device) -> None:
    assert ops.checksum(torch.arange(100, dtype=torch.uint8, device=triton_backend)) == KNOWN_CHECKSUM
    assert ops.checksum(torch.arange(100, dtype=torch.uint8, device=triton_backend).view(torch.int32)) == KNOWN_CHECKSUM


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
def test_block_copy(triton_backend: torch.device, dtype: torch.dtype) -> None:
    kv = torch.randint(100, (7, 2, 2, 3, 8, 5)).to(triton_backend, dtype)
    expected = kv.clone()
    expected[4], expected[0] = kv[1], kv[6]
    pairs = torch.tensor([[1, 4], [6, 0]])
    for where in {torch.device("cpu"), triton_backend}:
        copied = kv.clone()
        ops.block_copy(copied, pairs.to(where))
        assert torch.equal(copied, expected)
    ops.block_copy(kv, pairs[:0])


@pytest.mark.parametrize(
    ("dtype", "block_size", "head_dim"),
    # Words of 8, 4, 2 and 1 bytes; rows of whole words and others; one tile and several.
    [
        (torch.float32, 16, 64),
        (torch.bfloat16, 8, 4),
        (torch.float16, 5, 6),
        (torch.bfloat16, 7, 3),
        (torch.uint8, 16, 100),
        (torch.uint8, 16, 7),
    ],
    ids=str,
)
@pytest.mark.parametrize("tokens", [(0, 40), (3, 38), (17, 18), (9, 9)], ids=str)
def test_copies_equal_those_of_the_reference(
    triton_backend: torch.device, tokens: tuple[int, int], block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    num_ids = -(-40 // block_size)
    whole = torch.randint(100, (num_ids + 4, 4, 2, 3, block_size, head_dim)).to(triton_backend, dtype)
    ids = torch.randperm(num_ids + 4)[:num_ids]
    begin, end = tokens
    out = torch.empty(1, dtype=torch.int64, device=triton_backend)
    for heads in (slice(0, 3), slice(1, 2)):
        kv = whole[:, :, :, heads]
        where = (1, 3, ids.to(triton_backend), block_size, begin, end)
        shape = (2, 2, kv.shape[3], end - begin, head_dim)
        with ops.use_backend("reference"):
            expected = ops.gather_pages(kv, *where, torch.empty(shape, dtype=dtype, device=triton_backend))
            checksum = ops.checksum(expected)
            expected_pool = torch.full_like(whole, 101)
            ops.scatter_pages(expected_pool[:, :, :, heads], *where, expected)
        data = torch.empty(shape, dtype=dtype, device=triton_backend)
        assert torch.equal(ops.gather_pages(kv, *where, data), expected)
        data = torch.empty(shape, dtype=dtype, device=triton_backend)
        ops.gather_pages_summed_into(kv, *where, data, out)
        assert as_unsigned(out) == checksum
        assert torch.equal(data, expected)
        pool = torch.full_like(whole, 101)
        ops.scatter_pages(pool[:, :, :, heads], *where, data)
        assert torch.equal(pool, expected_pool)
        pool = torch.full_like(whole, 101)
        ops.scatter_pages_summed_into(pool[:, :, :, heads], *where, data, out)
        assert as_unsigned(out) == checksum
        assert torch.equal(pool, expected_pool)


def test_sums_are_also_given_as_numbers(triton_backend: torch.device) -> None:
    kv, ids = torch.randn(3, 2, 2, 2, 8, 4, device=triton_backend), torch.tensor([2, 0])
    data = torch.empty(2, 2, 2, 13, 4, device=triton_backend)
    sent = ops.gather_pages_summed(kv, 0, 2, ids, 8, 3, 16, data)
    assert sent == ops.checksum(data)
    flat = data.view(-1).view(torch.uint8)
    for position in (0, 200, flat.numel() - 1):
        flat[position] ^= 4
        assert ops.scatter_pages_summed(torch.zeros_like(kv), 0, 2, ids, 8, 3, 16, data) != sent
        flat[position] ^= 4
    assert ops.scatter_pages_summed(torch.zeros_like(kv), 0, 2, ids, 8, 3, 16, data) == sent


@pytest.mark.parametrize("backend", ops.available_backends())
def test_bad_arguments_are_refused(backend: str) -> None:
    kv, ids, out = torch.zeros(4, 2, 2, 1, 8, 4), torch.tensor([0, 1]), torch.zeros(1, 2, 1, 16, 4)
    sum_out = torch.zeros(1, dtype=torch.int64)
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match="block_ids"):
            ops.gather_pages_summed_into(kv, 0, 1, torch.tensor([0, 4]), 8, 0, 16, out, sum_out)
        with pytest.raises(ValueError, match="sum_out"):
            ops.scatter_pages_summed_into(kv, 0, 1, ids, 8, 0, 16, out, sum_out.int())
        with pytest.raises(ValueError, match="out must have shape"):
            ops.checksum_into(out, torch.zeros(2, dtype=torch.int64))
