"""A 64-bit checksum in plain torch, equal to the CPU library's.

    sum    = sum over i of mix(word[i] ^ ((i + 1) * G))   mod 2^64, words little-endian, the last one zero-padded
    result = mix(mix(sum) ^ num_bytes)

with the finaliser of splitmix64 as `mix`. `mix` is a bijection, so damage confined to one aligned 8-byte word always
changes the result; words that moved meet another key. It guards against accidents, not against forgery.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.reference.mixing import GOLDEN, mix

__all__ = ["checksum"]

_WORDS_PER_STEP = 1 << 20


def checksum(data: Tensor) -> int:
    """Checksum in [0, 2^64) of `data`, uint8 [N], contiguous."""
    num_bytes = data.numel()
    if num_bytes % 8 or data.data_ptr() % 8 or data.storage_offset() % 8:
        padded = torch.zeros((num_bytes + 7) // 8 * 8, dtype=torch.uint8, device=data.device)
        padded[:num_bytes] = data
        data = padded
    words = data.view(torch.int64)
    total = torch.zeros((), dtype=torch.int64, device=data.device)
    for begin in range(0, words.numel(), _WORDS_PER_STEP):
        step = words[begin : begin + _WORDS_PER_STEP]
        index = torch.arange(begin + 1, begin + 1 + step.numel(), dtype=torch.int64, device=data.device)
        total += mix(step ^ (index * GOLDEN)).sum()
    return int(mix(mix(total) ^ num_bytes).item()) % (1 << 64)
