"""Gumbel noise: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import expect, expect_index
from baton.kernels.reference import noise as reference

__all__ = ["gumbel_noise"]


def gumbel_noise(seeds: Tensor, positions: Tensor, vocab: int, out: Tensor | None = None) -> Tensor:
    """Standard Gumbel noise, each element a pure function of (seed, position, token id), the same on every backend.

    Adding it to `logits / temperature` and taking the argmax draws from the softmax.
    The generator is spelled out in `reference/noise.py`.

    Args:
        seeds: int64 [R], the bits of unsigned 64-bit seeds.
        positions: int64 [R].
        vocab: number of token ids, at least 1.
        out: fp32 [R, vocab], contiguous.
    """
    expect(vocab >= 1, f"vocab must be at least 1, got {vocab}")
    expect(seeds.dim() == 1, f"seeds must be [R], got {tuple(seeds.shape)}")
    expect_index("seeds", seeds, seeds.shape, seeds.device, torch.int64)
    expect_index("positions", positions, seeds.shape, seeds.device, torch.int64)
    if out is None:
        out = torch.empty((seeds.shape[0], vocab), dtype=torch.float32, device=seeds.device)
    else:
        expect_index("out", out, (seeds.shape[0], vocab), seeds.device, torch.float32)
    if uses_triton(seeds):
        from baton.kernels.triton import noise as triton

        triton.gumbel_noise(seeds, positions, out)
    elif (native := library_for(seeds)) is not None:
        native.gumbel_noise(seeds, positions, out)
    else:
        reference.gumbel_noise(seeds, positions, out)
    return out
