"""Copies of whole blocks, and between pages and contiguous buffers, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["block_copy", "gather_pages", "scatter_pages"]


def block_copy(kv: Tensor, pairs: Tensor) -> None:
    """Copy block `pairs[i, 0]` to block `pairs[i, 1]` of `kv` for each i, in any order."""
    kv[pairs[:, 1]] = kv[pairs[:, 0]]


def _locate(block_ids: Tensor, block_size: int, token_begin: int, token_end: int) -> tuple[Tensor, Tensor]:
    tokens = torch.arange(token_begin, token_end, device=block_ids.device)
    return block_ids[tokens // block_size], tokens % block_size


def gather_pages(
    kv: Tensor, layer_begin: int, layer_end: int, block_ids: Tensor, token_begin: int, token_end: int, out: Tensor
) -> None:
    """Copy tokens out of the pool to `out` [layers, 2, Hk, tokens, D]."""
    block, offset = _locate(block_ids.to(kv.device), kv.shape[4], token_begin, token_end)
    out.copy_(kv[block, layer_begin:layer_end, :, :, offset].permute(1, 2, 3, 0, 4))


def scatter_pages(
    kv: Tensor, layer_begin: int, layer_end: int, block_ids: Tensor, token_begin: int, token_end: int, data: Tensor
) -> None:
    """Copy `data` [layers, 2, Hk, tokens, D] to its places in the pool."""
    block, offset = _locate(block_ids.to(kv.device), kv.shape[4], token_begin, token_end)
    kv[block, layer_begin:layer_end, :, :, offset] = data.permute(3, 0, 1, 2, 4)
