"""Tables of the rotary embedding, computed as transformers computes them.

A table row is a function of its position alone. That makes "dynamic" (NTK) scaling what it is within
`max_position_embeddings`: no scaling. Beyond it transformers stretches all frequencies with the sequence's length,
which would rotate keys of one prefix differently in different requests; the runner therefore never serves such models
beyond `max_position_embeddings`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from baton.engine.rope_config import RopeConfig

__all__ = ["rope_tables"]


def rope_tables(rope: RopeConfig, *, head_dim: int, num_positions: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each fp32 [num_positions, head_dim / 2], contiguous on `device`."""
    # On CPU first: the same bits whatever the device.
    positions = torch.arange(num_positions, dtype=torch.float32)
    angles = positions[:, None] * _inverse_frequencies(rope, head_dim)
    return angles.cos().contiguous().to(device), angles.sin().contiguous().to(device)


def _inverse_frequencies(rope: RopeConfig, head_dim: int) -> Tensor:
    """Radians per position for each pair of dimensions, fp32 [head_dim / 2]."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    frequencies = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        return frequencies / rope.factor
    if rope.type == "llama3":
        return _llama3(rope, frequencies)
    assert rope.type in ("default", "dynamic"), rope.type
    return frequencies


def _llama3(rope: RopeConfig, frequencies: Tensor) -> Tensor:
    """Slow down long wavelengths by `factor`, keep short ones, blend between."""
    window = rope.original_max_position_embeddings
    longest, shortest = window / rope.low_freq_factor, window / rope.high_freq_factor
    wavelength = 2 * math.pi / frequencies
    smooth = (window / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    blended = (1 - smooth) * frequencies / rope.factor + smooth * frequencies
    scaled = torch.where(wavelength > longest, frequencies / rope.factor, frequencies)
    is_medium = ~(wavelength < shortest) & ~(wavelength > longest)
    return torch.where(is_medium, blended, scaled)
