"""Log-sum-exp over the vocabulary, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["logits_lse"]


def logits_lse(logits: Tensor, out: Tensor) -> None:
    """Write the natural log-sum-exp of each row of `logits` [R, V] to `out` [R]."""
    torch.logsumexp(logits, dim=-1, out=out)
