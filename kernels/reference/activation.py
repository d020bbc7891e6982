"""Gated activation in plain torch."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["silu_mul"]


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """Write `silu(gate) * up` [T, I] to `out`, where `gate_up` [T, 2*I] holds gate then up."""
    gate, up = gate_up.chunk(2, dim=-1)
    torch.mul(torch.nn.functional.silu(gate), up, out=out)
