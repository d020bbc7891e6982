"""Checksum, block copies, and copies between pages and contiguous buffers."""

from __future__ import annotations

import pytest
import torch

from baton.kernels import ops

KNOWN_CHECKSUM = 13221920741124930643


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 63, 64, 100, 4096, 100_003])
def test_checksum_is_equal_on_every_backend(native: str, num_bytes: int) -> None:
    data = torch.randint(256, (num_bytes + 3,), dtype=torch.uint8)
    for view in (data[:num_bytes], data[3:]):
        value = ops.checksum(view)
        assert 0 <= value < 2**64
        with ops.use_backend("reference"):
            assert ops.checksum(view) == value


def test_checksum_never_changes_between_versions(any_backend: str) -> None:
    assert ops.checksum(torch.arange(100, dtype=torch.uint8)) == KNOWN_CHECKSUM


def test_checksum_sees_every_flipped_bit(any_backend: str) -> None:
    data = torch.randint(256, (203,), dtype=torch.uint8)
    seen = {ops.checksum(data)}
    for index in range(203):
        for bit in range(8):
            data[index] ^= 1 << bit
            seen.add(ops.checksum(data))
            data[index] ^= 1 << bit
    assert len(seen) == 1 + 203 * 8


def test_checksum_sees_order_length_and_zeros(any_backend: str) -> None:
    data = torch.randint(256, (4096,), dtype=torch.uint8)
    swapped = torch.cat((data[2048:], data[:2048]))
    sums = [ops.checksum(x) for x in (data, swapped, data[:-1], data.flip(0))]
    sums += [ops.checksum(torch.zeros(n, dtype=torch.uint8)) for n in (0, 1, 8, 16)]
    assert len(set(sums)) == len(sums)


def test_checksum_takes_any_dtype_and_shape(any_backend: str) -> None:
    x = torch.randn(3, 5, 4).bfloat16()
    assert ops.checksum(x) == ops.checksum(x.view(torch.uint8).reshape(-1))
    with pytest.raises(ValueError, match="contiguous"):
        ops.checksum(x.transpose(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_block_copy(any_backend: str, dtype: torch.dtype) -> None:
    kv = torch.randn(7, 2, 2, 3, 8, 5).to(dtype)
    expected = kv.clone()
    expected[4], expected[0] = kv[1], kv[6]
    ops.block_copy(kv, torch.tensor([[1, 4], [6, 0]]))
    assert torch.equal(kv, expected)
    ops.block_copy(kv, torch.zeros(0, 2, dtype=torch.int64))
    assert torch.equal(kv, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32, 5])
@pytest.mark.parametrize("tokens", [(0, 40), (3, 38), (0, 1), (17, 18), (16, 32), (9, 9)], ids=str)
def test_gather_and_scatter(any_backend: str, tokens: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    num_ids = -(-40 // block_size)
    kv = torch.randint(100, (num_ids + 4, 4, 2, 3, block_size, 6)).to(dtype)
    ids = torch.randperm(num_ids + 4)[:num_ids]
    begin, end = tokens
    out = torch.empty(2, 2, 3, end - begin, 6, dtype=dtype)
    assert ops.gather_pages(kv, 1, 3, ids, block_size, begin, end, out) is out
    for token in range(begin, end):
        expected = kv[ids[token // block_size], 1:3, :, :, token % block_size]
        assert torch.equal(out[:, :, :, token - begin], expected)

    target = torch.full_like(kv, 101)
    ops.scatter_pages(target, 1, 3, ids, block_size, begin, end, out)
    written = target != 101
    assert int(written.sum()) == out.numel()
    assert torch.equal(target[written], kv[written])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8], ids=str)
@pytest.mark.parametrize(("block_size", "head_dim"), [(8, 64), (16, 8), (32, 24), (5, 6), (7, 100)])
@pytest.mark.parametrize("tokens", [(0, 40), (3, 38), (0, 1), (17, 18), (9, 9)], ids=str)
def test_copies_with_checksum_equal_copy_and_checksum(
    any_backend: str, tokens: tuple[int, int], block_size: int, head_dim: int, dtype: torch.dtype
) -> None:
    num_ids = -(-40 // block_size)
    whole_pool = torch.randint(100, (num_ids + 4, 4, 2, 5, block_size, head_dim)).to(dtype)
    ids = torch.randperm(num_ids + 4)[:num_ids]
    begin, end = tokens
    for kv in (whole_pool, whole_pool[:, :, :, 1:4]):
        out = torch.empty(2, 2, kv.shape[3], end - begin, head_dim, dtype=dtype)
        found = ops.gather_pages_summed(kv, 1, 3, ids, block_size, begin, end, out)
        assert torch.equal(out, ops.gather_pages(kv, 1, 3, ids, block_size, begin, end, torch.empty_like(out)))
        with ops.use_backend("reference"):
            assert found == ops.checksum(out)

        target, expected = torch.full_like(whole_pool, 101), torch.full_like(whole_pool, 101)
        heads = slice(1, 4) if kv.shape[3] == 3 else slice(0, 5)
        ops.scatter_pages(expected[:, :, :, heads], 1, 3, ids, block_size, begin, end, out)
        assert ops.scatter_pages_summed(target[:, :, :, heads], 1, 3, ids, block_size, begin, end, out) == found
        assert torch.equal(target, expected)


def test_copy_with_checksum_sums_what_it_wrote(any_backend: str) -> None:
    kv, ids = torch.randn(3, 2, 2, 2, 8, 4), torch.tensor([2, 0])
    data = torch.empty(2, 2, 2, 13, 4)
    sent = ops.gather_pages_summed(kv, 0, 2, ids, 8, 3, 16, data)
    flat = data.view(-1).view(torch.uint8)
    for position in (0, 7, 200, flat.numel() - 1):
        flat[position] ^= 4
        assert ops.scatter_pages_summed(torch.zeros_like(kv), 0, 2, ids, 8, 3, 16, data) != sent
        flat[position] ^= 4
    assert ops.scatter_pages_summed(torch.zeros_like(kv), 0, 2, ids, 8, 3, 16, data) == sent


def test_pages_move_between_block_sizes_and_head_ranges(any_backend: str) -> None:
    source = torch.randn(6, 3, 2, 4, 16, 8)
    target = torch.full((9, 3, 2, 2, 8, 8), float("nan"))
    source_ids, target_ids = torch.tensor([5, 0, 3]), torch.tensor([8, 1, 2, 7, 4])
    data = torch.empty(3, 2, 2, 33, 8)
    ops.gather_pages(source[:, :, :, 1:3], 0, 3, source_ids, 16, 2, 35, data)
    ops.scatter_pages(target, 0, 3, target_ids, 8, 2, 35, data)
    for token in range(2, 35):
        arrived = target[target_ids[token // 8], :, :, :, token % 8]
        assert torch.equal(arrived, source[source_ids[token // 16], :, :, 1:3, token % 16])


def test_bad_arguments_are_refused(any_backend: str) -> None:
    kv, ids, out = torch.zeros(4, 2, 2, 1, 8, 4), torch.tensor([0, 1]), torch.zeros(1, 2, 1, 16, 4)
    with pytest.raises(ValueError, match="block_ids"):
        ops.gather_pages(kv, 0, 1, torch.tensor([0, 4]), 8, 0, 16, out)
    with pytest.raises(ValueError, match="tokens"):
        ops.gather_pages(kv, 0, 1, ids, 8, 1, 17, out)
    with pytest.raises(ValueError, match="layers"):
        ops.scatter_pages(kv, 1, 3, ids, 8, 0, 16, out)
    with pytest.raises(ValueError, match="block_size"):
        ops.gather_pages(kv, 0, 1, ids, 16, 0, 16, out)
    with pytest.raises(ValueError, match="out must have shape"):
        ops.gather_pages(kv, 0, 1, ids, 8, 0, 15, out)
    with pytest.raises(ValueError, match="out must have shape"):
        ops.gather_pages_summed(kv, 0, 1, ids, 8, 0, 15, out)
    with pytest.raises(ValueError, match="block_ids"):
        ops.scatter_pages_summed(kv, 0, 1, torch.tensor([0, 4]), 8, 0, 16, out)
    with pytest.raises(ValueError, match="pairs"):
        ops.block_copy(kv, torch.tensor([[0, 4]]))
