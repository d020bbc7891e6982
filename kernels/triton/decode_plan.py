"""Buffers and launch of decode attention for one shape of batch.

A `DecodePlan` owns the work list and the workspace. It may serve all layers of a step, and, filled again by `update`,
every later step with the same numbers of rows and sequences; its addresses stay, so a CUDA graph may hold them. One
stream at a time: the kernels of one layer use the workspace that those of the next one use.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.triton.attention_tile import MAX_GROUP, padded_head_dim
from baton.kernels.triton.decode_work import ALL_ROWS, WorkList, WorkShape, plan_work
from baton.kernels.triton.device import Gpu, gpu_of
from baton.kernels.triton.launch_table import Launch, find_launch, next_power_of_2

__all__ = ["DecodePlan"]

_LARGEST_STREAMED_TILE = 64
_FIXED_TILE = 64
_LEAST_SHARE_TOKENS = 256
_FIXED_WORKSPACE_BYTES = 128 << 20


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Work list, workspace and launch of decode attention for one shape of batch. See the module for ownership."""

    work: WorkList
    launch: Launch
    tile_rows: int
    tokens_per_tile: int
    acc: Tensor
    stats: Tensor

    @classmethod
    def empty(
        cls,
        *,
        num_rows: int,
        num_sequences: int,
        num_q_heads: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
        window: int | None,
        fixed: bool,
        tokens_per_tile: int,
        max_context: int,
        max_query_rows: int = ALL_ROWS,
    ) -> DecodePlan:
        """Buffers for batches of `num_rows` query rows (padding included) of `num_sequences` sequences.

        Args:
            tokens_per_tile: query rows of a sequence that should share one reading of its keys, as far as that fits.
            max_context: no sequence has more keys; bounds the workspace of fixed mode.
            max_query_rows: sequences with more rows are passed over.
        Raises:
            ValueError: more than `MAX_GROUP` query heads per KV head, or no launch configuration for such shapes.
        """
        gpu = gpu_of(device)
        group = num_q_heads // num_kv_heads
        launch, tile_rows = _choose_launch(gpu, group, head_dim, dtype, fixed=fixed, tokens_per_tile=tokens_per_tile)
        block_d = padded_head_dim(head_dim)
        unit = launch.tiles["SPLIT"] if fixed else launch.tiles["BLOCK_N"]
        num_programs = gpu.num_sms * launch.tiles["PROGRAMS_PER_SM"]
        tile_tokens = tile_rows // group
        num_slots = 2 * num_programs
        if fixed:
            pieces = (num_rows // tile_tokens + num_sequences) * num_kv_heads * -(-max_context // unit)
            num_slots = min(pieces, _FIXED_WORKSPACE_BYTES // (tile_rows * block_d * 4))
        shape = WorkShape(
            num_rows=num_rows,
            num_sequences=num_sequences,
            num_kv_heads=num_kv_heads,
            tile_tokens=tile_tokens,
            unit_tokens=unit,
            num_programs=num_programs,
            min_share=1 if fixed else -(-_LEAST_SHARE_TOKENS // unit),
            num_slots=num_slots,
            fixed=fixed,
            window=window,
            max_query_rows=max_query_rows,
        )
        return cls(
            work=WorkList.empty(shape, device),
            launch=launch,
            tile_rows=tile_rows,
            tokens_per_tile=tokens_per_tile,
            acc=torch.empty((num_slots, tile_rows, block_d), dtype=torch.float32, device=device),
            stats=torch.empty((num_slots, 2, tile_rows), dtype=torch.float32, device=device),
        )

    def update(self, query_start: Tensor, context_lens: Tensor) -> None:
        """Make the work list of this batch; launches one small kernel, waits for nothing."""
        plan_work(self.work, query_start, context_lens)


def _choose_launch(
    gpu: Gpu, group: int, head_dim: int, dtype: torch.dtype, *, fixed: bool, tokens_per_tile: int
) -> tuple[Launch, int]:
    """(launch, packed rows of a tile)."""
    if group > MAX_GROUP:
        raise ValueError(f"at most {MAX_GROUP} query heads may share a KV head, got {group}")
    least = next_power_of_2(group)
    if fixed:
        # One tile for every batch: its shape is part of the bits.
        tile_rows = max(_FIXED_TILE, least)
    else:
        wanted = next_power_of_2(group * tokens_per_tile)
        tile_rows = max(16, least, min(wanted, _LARGEST_STREAMED_TILE))
    name = "fixed_attention" if fixed else "decode_attention"
    bucket = (tile_rows, padded_head_dim(head_dim))
    return find_launch(name, gpu.names, str(dtype).removeprefix("torch."), bucket), tile_rows
