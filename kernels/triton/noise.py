"""Counter-based Gumbel noise on a GPU: the bits of `reference/noise.py`.

Its logarithm is a fixed sequence of fp64 operations. They are equal here because each is correctly rounded (division is
`div.rn.f64`) and none is fused: kernels that call `gumbel_of_bits` are launched with `enable_fp_fusion=False`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.mixing import GOLDEN, mix
from baton.kernels.triton.stream_launches import stream_launch

__all__ = ["EXACT", "compile_cases", "gumbel_noise", "gumbel_of_bits", "noise_bits", "noise_key"]

_POSITION = tl.constexpr(0xD1342543DE82EF95)
_SIGNIFICAND = tl.constexpr((1 << 52) - 1)
_ONE_BITS = tl.constexpr(0x3FF0000000000000)


EXACT = ("div.rn.f64", "0d3FF6A09E667F3BCD", "0d3FB3B13B13B13B14")
"""For `CompileCase.uses`: rounded divisions; sqrt(2) and 1 / 13 in fp64."""


@triton.jit
def noise_key(seed, position):
    """Where the stream of (seed, position) starts, uint64, from int64 bits."""
    return mix(mix(seed.to(tl.uint64, bitcast=True) + GOLDEN) + position.to(tl.uint64, bitcast=True) * _POSITION)


@triton.jit
def noise_bits(key, token):
    """The 64 bits that decide a token's noise; `token` is int32 or int64."""
    return mix(key + (token + 1).to(tl.uint64) * GOLDEN)


@triton.jit
def _log(x):
    bits = x.to(tl.uint64, bitcast=True)
    exponent = ((bits >> 52).to(tl.int32) - 1023).to(tl.float64)
    mantissa = ((bits & _SIGNIFICAND) | _ONE_BITS).to(tl.float64, bitcast=True)
    # A number in a comparison would be rounded to fp32 first.
    large = mantissa > tl.full([], 1.4142135623730951, tl.float64)
    mantissa = tl.where(large, mantissa * 0.5, mantissa)
    exponent = tl.where(large, exponent + 1.0, exponent)
    s = (mantissa - 1.0) / (mantissa + 1.0)
    z = s * s
    series = z * (1.0 / 13.0) + (1.0 / 11.0)
    series = series * z + (1.0 / 9.0)
    series = series * z + (1.0 / 7.0)
    series = series * z + (1.0 / 5.0)
    series = series * z + (1.0 / 3.0)
    series = series * z + 1.0
    return exponent * 0.6931471805599453 + (s + s) * series


@triton.jit
def gumbel_of_bits(bits):
    """fp32 noise of the bits of `noise_bits`."""
    unit = ((bits >> 12) | _ONE_BITS).to(tl.float64, bitcast=True) - 1.0
    return (-_log(-_log(unit + 1.1102230246251565e-16))).to(tl.float32)


@triton.jit
def _noise_kernel(seeds_ptr, positions_ptr, out_ptr, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    key = noise_key(tl.load(seeds_ptr + row), tl.load(positions_ptr + row))
    tl.store(out_ptr + row * vocab + token, gumbel_of_bits(noise_bits(key, token)), mask=token < vocab)


def gumbel_noise(seeds: Tensor, positions: Tensor, out: Tensor) -> None:
    """See `ops.gumbel_noise`."""
    num_rows, vocab = out.shape
    if num_rows == 0:
        return
    launch = stream_launch("noise", vocab)
    _noise_kernel[(num_rows, triton.cdiv(vocab, launch.tiles["BLOCK"]))](
        seeds,
        positions,
        out,
        vocab,
        BLOCK=launch.tiles["BLOCK"],
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """One case; nothing in it may be fused, and divisions are exact."""
    launch = stream_launch("noise", 1)
    yield CompileCase(
        name="noise",
        kernel=_noise_kernel,
        types={"seeds_ptr": "*i64", "positions_ptr": "*i64", "out_ptr": "*fp32", "vocab": "i32"},
        constants=dict(launch.tiles),
        launch=launch,
        uses=dict.fromkeys((80, 90), EXACT),
        options={"enable_fp_fusion": False},
        absent=("fma.rn.f64",),
    )
