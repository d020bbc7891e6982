"""Draws tokens from logits where they are, into a tensor that stays there: the device's half of `sampler.py`.

For requests whose sampling is all in `pack_sampling`; penalties, masks and log-probabilities go through the host.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from baton.kernels import ops

__all__ = ["SAMPLING_WORDS", "draw_on_device", "draws_without_host"]

SAMPLING_WORDS = len(ops.pack_sampling(seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)) // 4
"""32-bit words of one `pack_sampling`."""


def draws_without_host(device: torch.device) -> bool:
    """Whether `draw_on_device` only enqueues there, and so can be part of a CUDA graph."""
    return device.type == "cpu"


def draw_on_device(logits: Tensor, samplings: Tensor, positions: Tensor) -> Tensor:
    """Draws one token per row, the same as `ops.draw_tokens`.

    Args:
        logits: fp32 [R, V].
        samplings: int32 [R, SAMPLING_WORDS], the bytes of `pack_sampling`.
        positions: int64 [R], of the tokens to be drawn.
    Returns:
        int64 [R] on the device of `logits`; `ops.NOT_A_NUMBER` where a row holds none.
    """
    drawn = ops.draw_tokens(
        logits,
        np.arange(logits.shape[0]),
        samplings.numpy(force=True).tobytes(),
        positions.numpy(force=True),
    )
    return torch.from_numpy(drawn).to(logits.device)
