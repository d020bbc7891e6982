"""Copies of whole blocks, and between pages and contiguous buffers: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import (
    expect,
    expect_dense_rows,
    expect_index,
    expect_like,
    expect_shape,
)
from baton.kernels.checked.checksum import checksum, checksum_into
from baton.kernels.reference import pages as reference

__all__ = [
    "block_copy",
    "gather_pages",
    "gather_pages_summed",
    "gather_pages_summed_into",
    "scatter_pages",
    "scatter_pages_summed",
    "scatter_pages_summed_into",
]


def _expect_pool(kv: Tensor) -> None:
    expect(
        kv.dim() == 6 and kv.shape[2] == 2,
        f"kv must be [num_blocks, num_layers, 2, Hk, block_size, D], got {tuple(kv.shape)}",
    )
    expect_dense_rows("kv", kv)


def _expect_blocks(name: str, block_ids: Tensor, num_blocks: int) -> None:
    # Looking at ids on a GPU would wait for it.
    if not block_ids.is_cpu:
        return
    if block_ids.numel() and not (int(block_ids.min()) >= 0 and int(block_ids.max()) < num_blocks):
        raise ValueError(f"{name} must be in [0, {num_blocks}), got {int(block_ids.min())} to {int(block_ids.max())}")


def _device_of_ids(ids: Tensor, kv: Tensor) -> torch.device:
    return kv.device if ids.device == kv.device else torch.device("cpu")


def block_copy(kv: Tensor, pairs: Tensor) -> None:
    """Copy whole blocks, all layers: block `pairs[i, 0]` to block `pairs[i, 1]`.

    Args:
        kv: [num_blocks, num_layers, 2, Hk, block_size, D], contiguous.
        pairs: int64 [N, 2] on CPU, or on the device of kv and then not checked; no block is both read and written, none
            is written twice.
    """
    _expect_pool(kv)
    expect(kv.is_contiguous(), "kv must be contiguous")
    expect_index("pairs", pairs, (pairs.shape[0], 2), _device_of_ids(pairs, kv), torch.int64)
    _expect_blocks("pairs", pairs, kv.shape[0])
    if uses_triton(kv):
        from baton.kernels.triton import pages as triton

        triton.block_copy(kv, pairs)
    elif (native := library_for(kv)) is not None:
        native.block_copy(kv, pairs)
    else:
        reference.block_copy(kv, pairs.to(kv.device))


def _expect_pages(
    kv: Tensor,
    layers: tuple[int, int],
    block_ids: Tensor,
    block_size: int,
    tokens: tuple[int, int],
    data_name: str,
    data: Tensor,
) -> None:
    _expect_pool(kv)
    expect(block_size == kv.shape[4], f"block_size is {block_size}, but the pool's is {kv.shape[4]}")
    expect(0 <= layers[0] <= layers[1] <= kv.shape[1], f"layers {layers} are not within the pool's {kv.shape[1]}")
    expect(block_ids.dim() == 1, f"block_ids must be [B], got {tuple(block_ids.shape)}")
    expect_index("block_ids", block_ids, block_ids.shape, _device_of_ids(block_ids, kv), torch.int64)
    _expect_blocks("block_ids", block_ids, kv.shape[0])
    held = block_ids.shape[0] * block_size
    expect(0 <= tokens[0] <= tokens[1] <= held, f"tokens {tokens} are not within the {held} of block_ids")
    shape = (layers[1] - layers[0], 2, kv.shape[3], tokens[1] - tokens[0], kv.shape[5])
    expect_shape(data_name, data, shape)
    expect_like(data_name, data, kv)
    expect(data.is_contiguous(), f"{data_name} must be contiguous")


def gather_pages(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    out: Tensor,
) -> Tensor:
    """Copy tokens `token_begin .. token_end` of one sequence out of the pool, for the layers of a group.

    Token t lives in block `block_ids[t // block_size]` at offset `t % block_size`.

    Args:
        kv: [num_blocks, num_layers, 2, Hk, block_size, D] of any dtype; a view on some heads is fine (D contiguous).
        block_ids: int64 [B] on CPU, or on the device of kv and then not checked.
        out: [layers, 2, Hk, tokens, D], contiguous, dtype and device of kv.
    Returns:
        `out`.
    """
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "out", out)
    if uses_triton(kv):
        from baton.kernels.triton import pages as triton

        triton.move_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, out, to_pool=False)
    elif (native := library_for(kv)) is not None:
        native.move_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, out, to_pool=False)
    else:
        reference.gather_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, out)
    return out


def scatter_pages(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    data: Tensor,
) -> None:
    """Copy `data` [layers, 2, Hk, tokens, D] into the pool: the inverse of `gather_pages`; block_ids are distinct."""
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "data", data)
    if uses_triton(kv):
        from baton.kernels.triton import pages as triton

        triton.move_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, data, to_pool=True)
    elif (native := library_for(kv)) is not None:
        native.move_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, data, to_pool=True)
    else:
        reference.scatter_pages(kv, layer_begin, layer_end, block_ids, token_begin, token_end, data)


def gather_pages_summed(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    out: Tensor,
) -> int:
    """`gather_pages`, and the `checksum` of `out`: one pass over memory where rows are whole 8-byte words."""
    if uses_triton(kv):
        sum_out = torch.empty(1, dtype=torch.int64, device=kv.device)
        gather_pages_summed_into(
            kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, out, sum_out
        )
        return int(sum_out.item()) % (1 << 64)
    native = library_for(kv)
    if native is None or not _has_whole_words(kv):
        gather_pages(kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, out)
        return checksum(out)
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "out", out)
    return native.move_pages(
        kv, layer_begin, layer_end, block_ids, token_begin, token_end, out, to_pool=False, with_checksum=True
    )


def gather_pages_summed_into(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    out: Tensor,
    sum_out: Tensor,
) -> None:
    """`gather_pages_summed` with the checksum's 64 bits written to `sum_out` int64 [1] on kv's device.

    On a GPU nothing waits.
    """
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "out", out)
    expect_index("sum_out", sum_out, (1,), kv.device, torch.int64)
    if uses_triton(kv):
        from baton.kernels.triton import pages as triton

        if triton.word_bytes(kv, out) == 8:
            triton.move_pages(
                kv, layer_begin, layer_end, block_ids, token_begin, token_end, out, to_pool=False, sum_out=sum_out
            )
            return
    gather_pages(kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, out)
    checksum_into(out, sum_out)


def scatter_pages_summed(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    data: Tensor,
) -> int:
    """`scatter_pages`, and the `checksum` of the bytes that were written, each read once: see `gather_pages_summed`.

    The pool has been written to when the checksum is known. Blocks whose sum is not the expected one hold garbage.
    """
    if uses_triton(kv):
        sum_out = torch.empty(1, dtype=torch.int64, device=kv.device)
        scatter_pages_summed_into(
            kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, data, sum_out
        )
        return int(sum_out.item()) % (1 << 64)
    native = library_for(kv)
    if native is None or not _has_whole_words(kv):
        scatter_pages(kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, data)
        return checksum(data)
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "data", data)
    return native.move_pages(
        kv, layer_begin, layer_end, block_ids, token_begin, token_end, data, to_pool=True, with_checksum=True
    )


def scatter_pages_summed_into(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    block_size: int,
    token_begin: int,
    token_end: int,
    data: Tensor,
    sum_out: Tensor,
) -> None:
    """`scatter_pages_summed` with the checksum's 64 bits written to `sum_out` int64 [1] on kv's device.

    On a GPU nothing waits.
    """
    _expect_pages(kv, (layer_begin, layer_end), block_ids, block_size, (token_begin, token_end), "data", data)
    expect_index("sum_out", sum_out, (1,), kv.device, torch.int64)
    if uses_triton(kv):
        from baton.kernels.triton import pages as triton

        if triton.word_bytes(kv, data) == 8:
            triton.move_pages(
                kv, layer_begin, layer_end, block_ids, token_begin, token_end, data, to_pool=True, sum_out=sum_out
            )
            return
    scatter_pages(kv, layer_begin, layer_end, block_ids, block_size, token_begin, token_end, data)
    checksum_into(data, sum_out)


def _has_whole_words(kv: Tensor) -> bool:
    return kv.dim() == 6 and kv.shape[5] * kv.element_size() % 8 == 0
