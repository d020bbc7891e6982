"""Paged attention on GPU: the choice between the two kernels, made from what the host knows without waiting.

    rows per sequence   kernel
    1 .. DECODE_ROWS    decode_attention, keys split over the GPU
    more                prefill_attention
    both in one batch   each kernel for its sequences
    deterministic       decode_attention with a fixed list, for all: a row's bits depend on its own sequence alone

Query lengths lie on the GPU. `T`, `S` and the caller's bounds on the rows per sequence decide which kernels are
launched; each kernel then finds its sequences on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.kernels.triton.decode_attention import decode_attention
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.decode_work import ALL_ROWS
from baton.kernels.triton.device import gpu_of
from baton.kernels.triton.prefill_attention import prefill_attention

__all__ = ["DECODE_ROWS", "make_plan", "paged_attention", "plan_step"]

DECODE_ROWS = 8
"""Most query rows per sequence that are worth splitting over keys: one token and the drafts that it verifies."""

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def paged_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    sliding_window: int | None,
    out: Tensor,
    *,
    deterministic: bool = False,
    min_query_rows: int = 1,
    max_query_rows: int | None = None,
    plan: DecodePlan | None = None,
) -> None:
    """Write causal attention of q over paged keys and values to `out`, as `reference.attention.paged_attention` does.

    Nothing waits for the GPU. Indices are not checked: they lie on the device.

    Args:
        q: [T, Hq, D], D contiguous.
        kv_layer: [num_blocks, 2, Hk, block_size, D], a view of the pool, D contiguous.
        block_tables: int32 [S, max_blocks].
        query_start: int32 [S+1].
        context_lens: int32 [S].
        scale: factor of the scores, > 0.
        out: [T, Hq, D]; rows from query_start[S] on become zeros.
        deterministic: fixed splits and tiles, see above.
        min_query_rows, max_query_rows: bounds on the rows of every sequence that has any, where the caller knows them.
        plan: from `plan_step`, or from `make_plan` and updated for this batch; without one, each call makes its own.
    Raises:
        ValueError: a dtype, stride, device, scale or group of heads that the kernels do not take.
    """
    _check(q, kv_layer, block_tables, query_start, context_lens, scale, out)
    num_rows, num_sequences = q.shape[0], context_lens.shape[0]
    if num_rows == 0 or num_sequences == 0:
        out.zero_()
        return
    if plan is None:
        plan = plan_step(
            q,
            kv_layer,
            block_tables,
            query_start,
            context_lens,
            sliding_window,
            deterministic=deterministic,
            min_query_rows=min_query_rows,
            max_query_rows=max_query_rows,
        )
    if plan is not None:
        decode_attention(q, kv_layer, block_tables, query_start, scale, out, plan)
    if not deterministic and _most_rows(max_query_rows, num_rows, num_sequences) > DECODE_ROWS:
        prefill_attention(
            q,
            kv_layer,
            block_tables,
            query_start,
            context_lens,
            scale,
            sliding_window,
            out,
            fewest_rows=1 if min_query_rows > DECODE_ROWS else DECODE_ROWS + 1,
        )


def plan_step(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    sliding_window: int | None,
    *,
    deterministic: bool = False,
    min_query_rows: int = 1,
    max_query_rows: int | None = None,
) -> DecodePlan | None:
    """The decode kernel's plan of one step, for all layers with this window; None where that kernel has no part in it.

    Args: as those of `paged_attention`.
    """
    num_sequences = context_lens.shape[0]
    if q.shape[0] == 0 or num_sequences == 0 or not (deterministic or min_query_rows <= DECODE_ROWS):
        return None
    plan = make_plan(
        q,
        kv_layer,
        num_sequences,
        sliding_window,
        deterministic=deterministic,
        max_query_rows=_most_rows(max_query_rows, q.shape[0], num_sequences),
        max_context=block_tables.shape[1] * kv_layer.shape[3],
    )
    plan.update(query_start, context_lens)
    return plan


def _most_rows(max_query_rows: int | None, num_rows: int, num_sequences: int) -> int:
    if max_query_rows is not None:
        return max_query_rows
    # Where there are no more rows than sequences, some few of them may still have several: tiles make them right.
    return 1 if num_rows <= num_sequences else num_rows


def make_plan(
    q: Tensor,
    kv_layer: Tensor,
    num_sequences: int,
    sliding_window: int | None,
    *,
    deterministic: bool,
    max_query_rows: int,
    max_context: int,
) -> DecodePlan:
    """Buffers for the decode kernel on batches shaped like `q` [T, Hq, D] and `kv_layer`; `update` fills them.

    Made once, filled once per step, it serves all layers with that window; all its addresses stay, so a CUDA graph may
    hold them.

    Args:
        max_query_rows: rows of the largest sequence, 1 for plain decoding.
        max_context: no sequence has more keys.
    """
    return DecodePlan.empty(
        num_rows=q.shape[0],
        num_sequences=num_sequences,
        num_q_heads=q.shape[1],
        num_kv_heads=kv_layer.shape[2],
        head_dim=q.shape[2],
        dtype=q.dtype,
        device=q.device,
        window=sliding_window,
        fixed=deterministic,
        tokens_per_tile=min(max_query_rows, DECODE_ROWS),
        max_context=max_context,
        max_query_rows=ALL_ROWS if deterministic or max_query_rows <= DECODE_ROWS else DECODE_ROWS,
    )


def _check(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    context_lens: Tensor,
    scale: float,
    out: Tensor,
) -> None:
    gpu_of(q.device)
    if q.dtype not in _DTYPES or kv_layer.dtype != q.dtype or out.dtype != q.dtype:
        raise ValueError(f"q, kv_layer and out must share fp32, bf16 or fp16, got {q.dtype, kv_layer.dtype, out.dtype}")
    if out.shape != q.shape or kv_layer.shape[4] != q.shape[2] or q.shape[1] % kv_layer.shape[2]:
        raise ValueError(f"shapes do not fit: q {tuple(q.shape)}, kv_layer {tuple(kv_layer.shape)}")
    for name, tensor in (("q", q), ("kv_layer", kv_layer), ("out", out), ("block_tables", block_tables)):
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(f"{name}'s last dimension must be contiguous, got strides {tensor.stride()}")
    for name, tensor in (("block_tables", block_tables), ("query_start", query_start), ("context_lens", context_lens)):
        if tensor.dtype != torch.int32 or tensor.device != q.device:
            raise ValueError(f"{name} must be int32 on {q.device}, got {tensor.dtype} on {tensor.device}")
    if not scale > 0.0:
        raise ValueError(f"scale must be greater than 0, got {scale}")
