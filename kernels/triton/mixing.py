"""The 64-bit mixing function that noise and checksums share; mirrors `reference/mixing.py`, on uint64."""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["GOLDEN", "mix"]

GOLDEN = tl.constexpr(0x9E3779B97F4A7C15)
_MIX_1 = tl.constexpr(0xBF58476D1CE4E5B9)
_MIX_2 = tl.constexpr(0x94D049BB133111EB)


@triton.jit
def mix(x):
    """The finaliser of splitmix64, of uint64."""
    x = (x ^ (x >> 30)) * _MIX_1
    x = (x ^ (x >> 27)) * _MIX_2
    return x ^ (x >> 31)
