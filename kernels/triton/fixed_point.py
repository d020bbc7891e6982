"""Scores as ordered integers, and their weights in fixed point: the arithmetic of `reference/sampling.py` in kernels.

A weight is made of correctly rounded fp64 operations in a fixed order and cut to an integer, so sums of weights are the
same in any order. Kernels that use it are launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["LOWEST_KEY", "key_of", "score_of", "weight_of"]

LOWEST_KEY = tl.constexpr(-0x7F800000)
"""Of the least finite number."""

_MAGIC = tl.constexpr(6755399441055744.0)
"""1.5 * 2^52: added to and taken off a small fp64 number, it rounds it to an integer, ties to even."""


@triton.jit
def key_of(x):
    """int32 in the order of the fp32 numbers `x`; both zeros have one key."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def score_of(key):
    """The number whose key this is."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def weight_of(score, best):
    """int64 `floor(exp(score - best) * 2^40)` for score <= best, both fp32."""
    difference = score.to(tl.float64) - best.to(tl.float64)
    scaled = tl.where(difference < -28.0, -28.0, difference) * 1.4426950408889634
    whole = (scaled + _MAGIC) - _MAGIC
    rest = scaled - whole
    power = rest * 4.4455382718708116e-10 + 7.054911620801123e-09
    power = power * rest + 1.01780860092397e-07
    power = power * rest + 1.321548679014431e-06
    power = power * rest + 1.5252733804059841e-05
    power = power * rest + 0.0001540353039338161
    power = power * rest + 0.0013333558146428443
    power = power * rest + 0.009618129107628477
    power = power * rest + 0.05550410866482158
    power = power * rest + 0.2402265069591007
    power = power * rest + 0.6931471805599453
    power = power * rest + 1.0
    # Times 2^(whole + 40), by the exponent's bits.
    bits = power.to(tl.int64, bitcast=True) + ((whole.to(tl.int64) + 40) << 52)
    return bits.to(tl.float64, bitcast=True).to(tl.int64)
