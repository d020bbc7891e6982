"""Paged attention of few query rows over many keys: split over the keys, persistent, safe inside CUDA graphs.

    plan_work      once per step     lengths on the GPU -> work list            (decode_work.py)
    attend_kernel  once per layer    program p walks its share of the list; whole segments go to `out`, pieces to the
                                     workspace, each with its maximum and sum
    merge_kernel   once per layer    merges the pieces of each segment that has several; in fixed mode in the order of
                                     their keys

A shared list cuts where it balances best, so a row's last bits depend on the batch. A fixed list (`fixed=True`) has
splits of fixed size at fixed places and fixed tiles, for prompts and single tokens alike: there a row's bits depend on
its own sequence alone. The split is FlashDecoding's (Dao and others, 2023), the equal share stream-K's (Osama and
others, 2023).

The buffers belong to a `DecodePlan` (`decode_plan.py`), the kernels are in `decode_kernels.py`.
"""

from __future__ import annotations

from torch import Tensor

from baton.kernels.triton.attention_tile import LOG2_E, padded_head_dim
from baton.kernels.triton.decode_kernels import attend_kernel, merge_kernel
from baton.kernels.triton.decode_plan import DecodePlan
from baton.kernels.triton.decode_work import RECORD
from baton.kernels.triton.device import INTERPRETED
from baton.kernels.triton.launch_table import Launch

__all__ = ["MERGE", "decode_attention"]

MERGE = Launch.of(4, 1, PIECES=16, STAGES=8)
"""How pieces are merged, on every GPU: PIECES at once, or in fixed mode one by one with STAGES in flight."""


def decode_attention(
    q: Tensor,
    kv_layer: Tensor,
    block_tables: Tensor,
    query_start: Tensor,
    scale: float,
    out: Tensor,
    plan: DecodePlan,
) -> None:
    """Attention of one layer, by a plan that was updated for this batch; shapes as in `attention.paged_attention`."""
    shape = plan.work.shape
    _, num_q_heads, head_dim = q.shape
    block_d = padded_head_dim(head_dim)
    group = num_q_heads // shape.num_kv_heads
    assert q.shape[0] == shape.num_rows, "a plan is for a fixed number of rows"
    attend_kernel[(shape.num_programs,)](
        q,
        kv_layer,
        block_tables,
        query_start,
        out,
        plan.work.tiles,
        plan.work.programs,
        plan.work.header,
        plan.acc,
        plan.stats,
        q.shape[0],
        shape.num_sequences,
        shape.window or 0,
        block_tables.stride(0),
        scale * LOG2_E,
        q.stride(0),
        q.stride(1),
        out.stride(0),
        out.stride(1),
        kv_layer.stride(0),
        kv_layer.stride(1),
        kv_layer.stride(2),
        kv_layer.stride(3),
        NUM_KV_HEADS=shape.num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_SIZE=kv_layer.shape[3],
        BLOCK_M=plan.tile_rows,
        BLOCK_N=plan.launch.tiles["BLOCK_N"],
        UNIT_TOKENS=shape.unit_tokens,
        RECORD_SIZE=RECORD,
        FIXED=shape.fixed,
        HAS_WINDOW=shape.window is not None,
        UPCAST=INTERPRETED,
        num_warps=plan.launch.num_warps,
        num_stages=plan.launch.num_stages,
    )
    merge_kernel[(shape.num_programs, plan.tokens_per_tile * group)](
        out,
        plan.work.tiles,
        plan.work.programs,
        plan.work.header,
        plan.acc,
        plan.stats,
        out.stride(0),
        out.stride(1),
        NUM_KV_HEADS=shape.num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_D=block_d,
        BLOCK_M=plan.tile_rows,
        PIECES=MERGE.tiles["PIECES"],
        STAGES=MERGE.tiles["STAGES"],
        RECORD_SIZE=RECORD,
        FIXED=shape.fixed,
        num_warps=MERGE.num_warps,
        num_stages=MERGE.num_stages,
    )
