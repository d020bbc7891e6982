"""Rounding of fp32 to a narrower dtype inside kernels, equal on the device and in Triton's interpreter.

The interpreter cuts the low bits off where the device rounds fp32 to bf16 to the nearest, ties to even, so there the
rounding is spelled out. Values that come from `rounded` are representable: storing them changes nothing.
"""

from __future__ import annotations

import triton
import triton.language as tl

__all__ = ["rounded"]

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """fp32 `x` rounded to `dtype`, as fp32."""
    if _INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        even = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        return tl.where(x == x, even, bits & 0xFFFF0000).to(tl.uint32).to(tl.float32, bitcast=True)
    else:
        return x.to(dtype).to(tl.float32)
