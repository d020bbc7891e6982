"""The 64-bit mixing function that noise and checksum share, on int64 tensors (arithmetic modulo 2^64)."""

from __future__ import annotations

from torch import Tensor

__all__ = ["GOLDEN", "as_int64", "mix", "shift_right"]


def as_int64(value: int) -> int:
    """The int64 with the bits of an unsigned 64-bit `value`."""
    return value - (1 << 64) if value >= 1 << 63 else value


GOLDEN = as_int64(0x9E3779B97F4A7C15)
_MIX_1 = as_int64(0xBF58476D1CE4E5B9)
_MIX_2 = as_int64(0x94D049BB133111EB)


def shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def mix(x: Tensor) -> Tensor:
    """The finaliser of splitmix64: a bijection of 64-bit words with full avalanche."""
    x = (x ^ shift_right(x, 30)) * _MIX_1
    x = (x ^ shift_right(x, 27)) * _MIX_2
    return x ^ shift_right(x, 31)
