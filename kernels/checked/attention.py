"""Paged attention: checks, then the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.backends import library_for, uses_triton
from baton.kernels.checked.arguments import (
    DTYPES,
    expect,
    expect_dense_rows,
    expect_dtype,
    expect_index,
    expect_kv_layer,
    expect_like,
    expect_shape,
)
from baton.kernels.reference import attention as reference

__all__ = ["attention_plan", "paged_attention"]


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    scale: float,
    sliding_window: int | None = None,
    out: Tensor | None = None,
    deterministic: bool = False,
    query_rows: tuple[int, int] | None = None,
    plan: object | None = None,
) -> Tensor:
    """Causal attention of a mixed batch of decode rows and prefill chunks over paged keys and values.

    Sequence s owns rows `query_start[s] .. query_start[s+1]` (none is fine); its last row stands at position
    `context_lens[s] - 1`. A row at position p sees keys 0..p, or the last `sliding_window` of them, itself included.
    Keys and values that no row sees are never read. Rows from `query_start[S]` on are padding and give zeros.

    Args:
        q: [T, Hq, D], strided views are fine (D contiguous); Hq is a multiple of Hk.
        kv_layer: [num_blocks, 2, Hk, block_size, D], a view `kv[:, layer]` of the pool, dtype of q.
        block_tables: int32 [S, max_blocks]; entries past a sequence's last block, or before its window, are not read.
        query_start: int32 [S+1], starting at 0, not decreasing.
        context_lens: int32 [S].
        scale: factor of the scores, usually D ** -0.5.
        out: [T, Hq, D].
        deterministic: on a GPU, no row's bits may depend on the batch, at some cost; the C++ library always keeps that.
        query_rows: the fewest and the most rows of a sequence, where the host knows.
        plan: of `attention_plan` for the same arguments, in the same step.
    Returns:
        `out`, dtype of q.
    """
    expect(q.dim() == 3, f"q must be [T, Hq, D], got {tuple(q.shape)}")
    expect_dtype("q", q, *DTYPES)
    expect_dense_rows("q", q)
    expect_kv_layer(kv_layer, q, q.shape[2])
    expect(q.shape[1] % kv_layer.shape[2] == 0, f"{q.shape[1]} query heads do not divide over {kv_layer.shape[2]}")
    num_sequences = context_lens.shape[0]
    expect(block_tables.dim() == 2, f"block_tables must be [S, max_blocks], got {tuple(block_tables.shape)}")
    expect_shape("block_tables", block_tables, (num_sequences, block_tables.shape[1]))
    expect_dtype("block_tables", block_tables, torch.int32)
    expect_dense_rows("block_tables", block_tables)
    expect_index("query_start", query_start, (num_sequences + 1,), q.device, torch.int32)
    expect_index("context_lens", context_lens, (num_sequences,), q.device, torch.int32)
    expect(sliding_window is None or sliding_window >= 1, f"sliding_window must be at least 1, got {sliding_window}")
    if out is None:
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    else:
        expect_shape("out", out, q.shape)
        expect_like("out", out, q)
        expect_dense_rows("out", out)
    if uses_triton(q):
        from baton.kernels.triton import attention as triton

        triton.paged_attention(
            q,
            kv_layer,
            block_tables,
            query_start,
            context_lens,
            scale,
            sliding_window,
            out,
            deterministic=deterministic,
            **_row_bounds(query_rows),
            plan=plan,  # type: ignore[arg-type]
        )
    elif (native := library_for(q)) is not None:
        native.paged_attention(q, kv_layer, block_tables, query_start, context_lens, scale, sliding_window, out)
    else:
        reference.paged_attention(q, kv_layer, block_tables, query_start, context_lens, scale, sliding_window, out)
    return out


def attention_plan(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    *,
    sliding_window: int | None = None,
    deterministic: bool = False,
    query_rows: tuple[int, int] | None = None,
) -> object | None:
    """What `paged_attention` works out about a step, once for all layers with this window; None: nothing.

    Args: as those of `paged_attention`, of any such layer.
    """
    if not uses_triton(q):
        return None
    from baton.kernels.triton import attention as triton

    return triton.plan_step(
        q,
        kv_layer,
        block_tables,
        query_start,
        context_lens,
        sliding_window,
        deterministic=deterministic,
        **_row_bounds(query_rows),
    )


def _row_bounds(query_rows: tuple[int, int] | None) -> dict[str, int]:
    return {} if query_rows is None else {"min_query_rows": query_rows[0], "max_query_rows": query_rows[1]}
