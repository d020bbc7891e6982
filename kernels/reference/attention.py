"""Paged attention in plain torch: gather each sequence's pages, then masked softmax in fp32.

The oracle of the other backends. Its matrix products may change their last bits with the number of rows, so it does
not keep the promise of row-invariance; the CPU library does.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["paged_attention"]


def _first_visible(position: int, sliding_window: int | None) -> int:
    return 0 if sliding_window is None else max(0, position - sliding_window + 1)


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
) -> None:
    """Write causal attention of q [T, Hq, D] over paged keys and values to `out` [T, Hq, D]."""
    num_q_heads, num_kv_heads, block_size = q.shape[1], kv_layer.shape[2], kv_layer.shape[3]
    starts, contexts = query_start.tolist(), context_lens.tolist()
    out[starts[-1] :] = 0
    for sequence, context in enumerate(contexts):
        begin, end = starts[sequence], starts[sequence + 1]
        if begin == end:
            continue
        first_position = context - (end - begin)
        first_key = _first_visible(first_position, sliding_window)
        first_block = first_key // block_size
        blocks = block_tables[sequence, first_block : -(-context // block_size)].long()
        keys_begin, keys_end = first_key - first_block * block_size, context - first_block * block_size
        pages = kv_layer[blocks].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, keys_begin:keys_end].float()
        key, value = pages[0], pages[1]  # [Hk, keys, D]
        rows = q[begin:end].float().unflatten(1, (num_kv_heads, num_q_heads // num_kv_heads))
        scores = torch.einsum("thgd,hkd->thgk", rows, key) * scale
        row_position = torch.arange(first_position, context, device=q.device).unsqueeze(1)
        key_position = torch.arange(first_key, context, device=q.device).unsqueeze(0)
        hidden = key_position > row_position
        if sliding_window is not None:
            hidden |= row_position - key_position >= sliding_window
        scores.masked_fill_(hidden[:, None, None, :], float("-inf"))
        mixed = torch.einsum("thgk,hkd->thgd", scores.softmax(-1), value)
        out[begin:end] = mixed.flatten(1, 2).to(out.dtype)
