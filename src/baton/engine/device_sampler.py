"""Draws tokens from logits where they are, into a tensor that stays there: the device's half of `sampler.py`.

For requests whose sampling is all in `pack_sampling`; penalties, masks and log-probabilities go through the host.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels import ops

__all__ = ["SAMPLING_WORDS", "draw_into", "draws_without_host"]

SAMPLING_WORDS = len(ops.pack_sampling(seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)) // 8
"""64-bit words of one `pack_sampling`."""


def draws_without_host(device: torch.device) -> bool:
    """Whether `draw_into` only enqueues there, and so can be part of a CUDA graph."""
    return device.type == "cpu"


def draw_into(logits: Tensor, row_ids: Tensor, samplings: Tensor, positions: Tensor, out: Tensor) -> None:
    """`ops.draw_tokens` with all arguments on the device of the logits.

    Args:
        logits: fp32 [R, V].
        row_ids: int64 [N], the row of each request.
        samplings: int64 [N, SAMPLING_WORDS], the bytes of `pack_sampling`.
        positions: int64 [N], of the tokens to be drawn.
        out: int64 [N], the tokens; `ops.NOT_A_NUMBER` where a row holds none.
    """
    drawn = ops.draw_tokens(
        logits,
        row_ids.numpy(force=True),
        samplings.numpy(force=True).tobytes(),
        positions.numpy(force=True),
    )
    out.copy_(torch.from_numpy(drawn))
