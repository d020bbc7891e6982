"""RMS norm on a GPU: whole rows in registers, read once; several short rows (heads) per program.

Mirrors `reference/norm.py`; sums run in the order that the row's width alone decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.launch_table import next_power_of_2
from baton.kernels.triton.rounding import rounded
from baton.kernels.triton.stream_launches import USES_VECTORS, stream_launch

__all__ = ["compile_cases", "rms_norm"]


@triton.jit(do_not_specialize=["num_rows"])
def _norm_kernel(
    x_ptr,
    residual_ptr,
    weight_ptr,
    out_ptr,
    num_rows,
    eps,
    x_row,
    x_head,
    residual_row,
    out_row,
    out_head,
    HEADS: tl.constexpr,
    DIM: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    dtype: tl.constexpr = x_ptr.dtype.element_ty
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    live = (row < num_rows)[:, None] & (column < DIM)[None, :]
    token, head = row // HEADS, row % HEADS
    x = tl.load(x_ptr + (token * x_row + head * x_head)[:, None] + column[None, :], mask=live, other=0.0)
    x = x.to(tl.float32)
    if residual_ptr is not None:
        at = (token * residual_row)[:, None] + column[None, :]
        x = rounded(x + tl.load(residual_ptr + at, mask=live, other=0.0).to(tl.float32), dtype)
        tl.store(residual_ptr + at, x.to(dtype), mask=live)
    factor = tl.rsqrt(tl.sum(x * x, axis=1) / DIM + eps)
    weight = tl.load(weight_ptr + column, mask=column < DIM, other=0.0).to(tl.float32)
    normed = rounded(rounded(x * factor[:, None], dtype) * weight[None, :], dtype)
    tl.store(out_ptr + (token * out_row + head * out_head)[:, None] + column[None, :], normed.to(dtype), mask=live)


def rms_norm(x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
    """See `ops.rms_norm`; rows of up to 65536 elements."""
    dim = x.shape[-1]
    heads = x.shape[1] if x.dim() == 3 else 1
    num_rows = x.shape[0] * heads
    if num_rows == 0 or dim == 0:
        return
    launch = stream_launch("norm", dim)
    block = next_power_of_2(dim)
    rows = max(1, launch.tiles["BLOCK"] // block)
    _norm_kernel[(triton.cdiv(num_rows, rows),)](
        x,
        residual,
        weight,
        out,
        num_rows,
        eps,
        x.stride(0),
        x.stride(1) if x.dim() == 3 else 0,
        0 if residual is None else residual.stride(0),
        out.stride(0),
        out.stride(1) if out.dim() == 3 else 0,
        HEADS=heads,
        DIM=dim,
        ROWS=rows,
        BLOCK=block,
        num_warps=launch.num_warps,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """Hidden sizes and head norms, with and without a residual; the same for every GPU."""
    for dtype in ("bf16", "fp16", "fp32"):
        for dim, heads, has_residual in ((4096, 1, True), (4096, 1, False), (128, 32, False), (16384, 1, True)):
            launch = stream_launch("norm", dim)
            pointers = ("x_ptr", "weight_ptr", "out_ptr", *(("residual_ptr",) if has_residual else ()))
            numbers = ("num_rows", "x_row", "x_head", "residual_row", "out_row", "out_head")
            rows = max(1, launch.tiles["BLOCK"] // dim)
            yield CompileCase(
                name=f"norm/{dtype}/{dim}x{heads}{'/residual' if has_residual else ''}",
                kernel=_norm_kernel,
                types={**dict.fromkeys(pointers, f"*{dtype}"), **dict.fromkeys(numbers, "i32"), "eps": "fp32"},
                constants={"HEADS": heads, "DIM": dim, "ROWS": rows, "BLOCK": dim}
                | ({} if has_residual else {"residual_ptr": None}),
                launch=launch,
                uses=USES_VECTORS,
            )
