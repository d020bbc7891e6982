"""Counter-based Gumbel noise in plain torch, equal to the CPU library's to the last bit.

Element (r, token) is a pure function of (seed[r], position[r], token):

    key  = mix(mix(seed + G) + position * P)          mix: the finaliser of splitmix64
    bits = mix(key + (token + 1) * G)                 so a row is a splitmix64 stream that starts at `key`
    u    = (bits >> 12) * 2^-52 + 2^-53               in (0, 1), exact in fp64
    g    = float32(-log(-log(u)))

`log` is a fixed sequence of fp64 additions, multiplications and divisions (each correctly rounded by IEEE 754, none
fused), so every backend and device agrees. Integer arithmetic is modulo 2^64.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.reference.mixing import GOLDEN, as_int64, mix, shift_right

__all__ = ["gumbel_noise", "uniform_bits"]


_POSITION = as_int64(0xD1342543DE82EF95)
_LN2 = 0.6931471805599453
_SQRT2 = 1.4142135623730951


def uniform_bits(seeds: Tensor, positions: Tensor, vocab: int) -> Tensor:
    """64 random bits per element, int64 [R, vocab], from seeds and positions int64 [R]."""
    key = mix(mix(seeds + GOLDEN) + positions * _POSITION)
    counter = torch.arange(1, vocab + 1, device=seeds.device, dtype=torch.int64) * GOLDEN
    return mix(key.unsqueeze(1) + counter)


def _log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal fp64 numbers, relative error below 1e-11."""
    bits = x.view(torch.int64)
    exponent = ((bits >> 52) - 1023).double()
    mantissa = ((bits & 0xFFFFFFFFFFFFF) | 0x3FF0000000000000).view(torch.float64)
    large = mantissa > _SQRT2
    mantissa = torch.where(large, mantissa * 0.5, mantissa)
    exponent = torch.where(large, exponent + 1.0, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    series = z * (1.0 / 13.0) + (1.0 / 11.0)
    for denominator in (9.0, 7.0, 5.0, 3.0):
        series = series * z + (1.0 / denominator)
    series = series * z + 1.0
    return exponent * _LN2 + (s + s) * series


def gumbel_noise(seeds: Tensor, positions: Tensor, out: Tensor) -> None:
    """Write standard Gumbel noise for (seeds[r], positions[r], token) to `out` fp32 [R, vocab]."""
    bits = uniform_bits(seeds, positions, out.shape[1])
    unit = (shift_right(bits, 12) | 0x3FF0000000000000).view(torch.float64) - 1.0
    u = unit + 2.0**-53
    out.copy_(-_log(-_log(u)))
