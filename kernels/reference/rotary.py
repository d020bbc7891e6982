"""Rotary embedding and the write of K and V into pages, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rope_and_cache"]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Half-split rotation of x [T, heads, D] by cos, sin [T, 1, rot/2]; dimensions past `rot` stay."""
    half = cos.shape[-1]
    first, second, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def rope_and_cache(
    q: Tensor, k: Tensor, v: Tensor, cos: Tensor, sin: Tensor, positions: Tensor, kv_layer: Tensor, slots: Tensor
) -> None:
    """Rotate q [T, Hq, D] in place; write rotated k and v [T, Hk, D] to their slots of `kv_layer`."""
    index = positions.long()
    cos_rows = cos[index].to(q.dtype).unsqueeze(1)
    sin_rows = sin[index].to(q.dtype).unsqueeze(1)
    q.copy_(_rotate(q, cos_rows, sin_rows))
    rows = torch.nonzero(slots >= 0).squeeze(1)
    block_size = kv_layer.shape[3]
    block, offset = slots[rows].long() // block_size, slots[rows].long() % block_size
    kv_layer[block, 0, :, offset] = _rotate(k[rows], cos_rows[rows], sin_rows[rows])
    kv_layer[block, 1, :, offset] = v[rows]
