"""The pool of KV blocks on one device: how large, and where.

Layout as in `kv_layout.py`. On CPU the pool's memory is reserved and not touched: a page costs memory once a token is
written to it. Pages are huge ones where the system has them, as attention reads blocks that lie scattered.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.host_memory import available_host_bytes
from baton.engine.kv_layout import KvLayout
from baton.errors import ConfigError
from baton.kernels.packed_linear import allocate

__all__ = ["allocate_kv", "plan_num_blocks"]

_CPU_SHARE = 0.25
_CPU_AUTO_MAX_BYTES = 2 << 30


def allocate_kv(
    layout: KvLayout, num_blocks: int, *, dtype: torch.dtype, device: torch.device, has_scratch: bool = False
) -> Tensor:
    """Pool [num_blocks, num_layers, 2, num_kv_heads, block_size, head_dim]: zeros on CPU, uninitialised elsewhere.

    Args:
        has_scratch: one block more, the last and all zeros, which no sequence gets: padding rows belong to it.

    Raises:
        ConfigError: the device cannot give that much memory.
    """
    shape = (num_blocks + has_scratch, layout.num_layers, 2, layout.num_kv_heads, layout.block_size, layout.head_dim)
    try:
        if device.type == "cpu":
            pool = allocate(shape[0] * layout.block_bytes).view(dtype).view(shape)
        else:
            pool = torch.empty(shape, dtype=dtype, device=device)
    except (RuntimeError, OSError) as error:
        gib = num_blocks * layout.block_bytes / (1 << 30)
        raise ConfigError(
            f"no {gib:.2f} GiB for {num_blocks} KV blocks on {device}; lower kv.memory: {error}"
        ) from error
    if has_scratch:
        pool[-1].zero_()
    return pool


def plan_num_blocks(
    layout: KvLayout,
    *,
    num_blocks: int | None,
    memory_bytes: int | None,
    min_tokens: int,
    device: torch.device,
    workers_on_host: int,
) -> int:
    """How many blocks the pool has.

    Args:
        num_blocks: wins where given.
        memory_bytes: else this much memory, or where None, on CPU, a quarter of what is free divided by
            `workers_on_host`, at most 2 GiB; on CUDA it is measured first (`kv_memory.py`).
        min_tokens: the longest sequence that must fit.

    Raises:
        ConfigError: the pool would not hold one sequence of `min_tokens`.
    """
    needed = layout.num_blocks_for(min_tokens)
    if num_blocks is None:
        if memory_bytes is None:
            assert device.type == "cpu", f"the KV memory of {device} is planned beforehand"
            memory_bytes = min(int(available_host_bytes() * _CPU_SHARE) // workers_on_host, _CPU_AUTO_MAX_BYTES)
        num_blocks = memory_bytes // layout.block_bytes
        given = f"{memory_bytes / (1 << 20):.1f} MiB of KV memory"
    else:
        given = f"{num_blocks} KV blocks"
    if num_blocks < needed:
        raise ConfigError(
            f"{given} hold {num_blocks * layout.block_size} tokens, fewer than max_model_len = {min_tokens}; raise "
            f"kv.memory to at least {needed * layout.block_bytes / (1 << 20):.1f} MiB or lower model.max_model_len"
        )
    return num_blocks
