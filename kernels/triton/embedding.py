"""Rows of an embedding, or of a rank's part of it, on a GPU; mirrors `reference/embedding.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.stream_launches import USES_VECTORS, stream_launch

__all__ = ["compile_cases", "embedding"]


@triton.jit(do_not_specialize=["first_token"])
def _embedding_kernel(
    ids_ptr, weight_ptr, out_ptr, first_token, shard_size, weight_row, out_row, DIM: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    token = tl.load(ids_ptr + row).to(tl.int64) - first_token
    is_mine = (token >= 0) & (token < shard_size)
    live = column < DIM
    values = tl.load(weight_ptr + token * weight_row + column, mask=live & is_mine, other=0.0)
    tl.store(out_ptr + row * out_row + column, values, mask=live)


def embedding(token_ids: Tensor, weight: Tensor, first_token: int, out: Tensor) -> None:
    """See `ops.embedding`."""
    num_rows, dim = out.shape
    if num_rows == 0 or dim == 0:
        return
    launch = stream_launch("embedding", dim)
    _embedding_kernel[(num_rows, triton.cdiv(dim, launch.tiles["BLOCK"]))](
        token_ids,
        weight,
        out,
        first_token,
        weight.shape[0],
        weight.stride(0),
        out.stride(0),
        DIM=dim,
        BLOCK=launch.tiles["BLOCK"],
        num_warps=launch.num_warps,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """One hidden size per dtype and kind of index; the same for every GPU."""
    launch = stream_launch("embedding", 4096)
    for dtype in ("bf16", "fp16", "fp32"):
        for index in ("i32", "i64"):
            numbers = ("first_token", "shard_size", "weight_row", "out_row")
            yield CompileCase(
                name=f"embedding/{dtype}/{index}",
                kernel=_embedding_kernel,
                types={"ids_ptr": f"*{index}", "weight_ptr": f"*{dtype}", "out_ptr": f"*{dtype}"}
                | dict.fromkeys(numbers, "i32"),
                constants={"DIM": 4096, "BLOCK": launch.tiles["BLOCK"]},
                launch=launch,
                uses=USES_VECTORS,
            )
