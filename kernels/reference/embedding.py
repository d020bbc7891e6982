"""Rows of an embedding, or of a rank's part of it, in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["embedding"]


def embedding(token_ids: Tensor, weight: Tensor, first_token: int, out: Tensor) -> None:
    """Write row `token_ids[t] - first_token` of `weight` [N, H] to out[t], zeros where there is none."""
    places = token_ids.long() - first_token
    is_mine = (places >= 0) & (places < weight.shape[0])
    rows = torch.nn.functional.embedding(places.where(is_mine, 0), weight) if weight.shape[0] else torch.zeros_like(out)
    out.copy_(rows.masked_fill_(~is_mine[:, None], 0.0))
