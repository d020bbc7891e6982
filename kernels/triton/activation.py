"""Gated activation on a GPU; mirrors `reference/activation.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.rounding import rounded
from baton.kernels.triton.stream_launches import USES_VECTORS, stream_launch

__all__ = ["compile_cases", "silu_mul"]


@triton.jit
def _silu_kernel(gate_up_ptr, out_ptr, in_row, out_row, DIM: tl.constexpr, BLOCK: tl.constexpr):
    dtype: tl.constexpr = out_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    live = column < DIM
    gate = tl.load(gate_up_ptr + row * in_row + column, mask=live, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * in_row + DIM + column, mask=live, other=0.0).to(tl.float32)
    silu = rounded(gate / (1.0 + tl.exp(-gate)), dtype)
    tl.store(out_ptr + row * out_row + column, rounded(silu * up, dtype).to(dtype), mask=live)


def silu_mul(gate_up: Tensor, out: Tensor) -> None:
    """See `ops.silu_mul`."""
    num_rows, dim = out.shape
    if num_rows == 0 or dim == 0:
        return
    launch = stream_launch("activation", dim)
    _silu_kernel[(num_rows, triton.cdiv(dim, launch.tiles["BLOCK"]))](
        gate_up, out, gate_up.stride(0), out.stride(0), DIM=dim, BLOCK=launch.tiles["BLOCK"], num_warps=launch.num_warps
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """One width of an MLP per dtype; the same for every GPU."""
    launch = stream_launch("activation", 14336)
    for dtype in ("bf16", "fp16", "fp32"):
        yield CompileCase(
            name=f"activation/{dtype}",
            kernel=_silu_kernel,
            types={"gate_up_ptr": f"*{dtype}", "out_ptr": f"*{dtype}", "in_row": "i32", "out_row": "i32"},
            constants={"DIM": 14336, "BLOCK": launch.tiles["BLOCK"]},
            launch=launch,
            uses=USES_VECTORS,
        )
