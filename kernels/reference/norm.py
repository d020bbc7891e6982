"""RMS norm in plain torch, rounded where Hugging Face's `LlamaRMSNorm` rounds."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["rms_norm"]


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    """Write `norm(x) * weight` to `out` [..., D]; with `residual`, add `x` to it in place first and norm the sum."""
    if residual is not None:
        residual.add_(x)
        x = residual
    x_fp32 = x.float()
    mean_square = x_fp32.square().mean(-1, keepdim=True)
    out.copy_((x_fp32 * torch.rsqrt(mean_square + eps)).to(x.dtype) * weight)
