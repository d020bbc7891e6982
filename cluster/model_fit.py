"""Whether the model can be split as configured, and fits this host: before any process starts, without torch.

The estimate of memory is low on purpose, so that nothing is refused that could work: the weights of every rank in the
type in which they are served, and the KV pages asked for, or those of one request of `model.max_model_len` where that
is set. It is made where all ranks run on this host's CPU; elsewhere each rank finds out for itself.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from baton.config import ClusterConfig, format_bytes
from baton.engine.checkpoint import Checkpoint
from baton.engine.host_memory import available_host_bytes
from baton.engine.kv_layout import DTYPE_BYTES
from baton.engine.model_config import ModelConfig
from baton.engine.partition import Partition, check_parallel
from baton.errors import CheckpointError, ConfigError

__all__ = ["RankBytes", "check_fit", "check_layouts", "check_memory", "memory_of_pool"]

_ROLES = ("prefill", "decode")
_HEAD = "lm_head.weight"
_EMBED = "model.embed_tokens.weight"
_NVIDIA = Path("/dev/nvidiactl")


@dataclass(frozen=True, slots=True)
class RankBytes:
    """What one rank needs at least: its part of the weights, and the pages asked for."""

    weights: int
    kv: int


def check_fit(config: ClusterConfig, launcher: str, folder: Path) -> None:
    """Refuse what cannot work; `folder` holds the model.

    Raises:
        ConfigError: names the key, the sizes, and what would work.
        CheckpointError: the model folder is damaged.
    """
    try:
        model = ModelConfig.from_dir(folder)
        check_layouts(config, model)
        on_this_cpu = config.device == "cpu" or (config.device == "auto" and not _NVIDIA.exists())
        if on_this_cpu and (launcher == "local" or config.ray.address is None):
            check_memory(config, model, Checkpoint.from_dir(folder), available_host_bytes())
    except CheckpointError as error:
        raise CheckpointError(f"{error}; `baton doctor` checks what a start needs") from error


def check_layouts(config: ClusterConfig, model: ModelConfig) -> None:
    """Refuse a (TP, PP) of either pool into which the model cannot be split.

    Raises:
        ConfigError: for example "decode.tensor_parallel = 3: ...; what works: 1, 2".
    """
    for role in _ROLES:
        pool = config.pool(role)
        try:
            check_parallel(model, tensor_parallel=pool.tensor_parallel, pipeline_parallel=pool.pipeline_parallel)
        except ConfigError as error:
            raise ConfigError(f"{role}.{error}") from error


def check_memory(config: ClusterConfig, model: ModelConfig, checkpoint: Checkpoint, available_bytes: int) -> None:
    """Refuse pools that need more than `available_bytes` of this host's memory.

    Raises:
        ConfigError: with what each pool needs, and what would work.
    """
    pools = {role: memory_of_pool(config, role, model, checkpoint) for role in _ROLES}
    weights = {role: config.pool(role).replicas * sum(rank.weights for rank in pools[role]) for role in _ROLES}
    kv = {role: config.pool(role).replicas * sum(rank.kv for rank in pools[role]) for role in _ROLES}
    needed = sum(weights.values()) + sum(kv.values())
    if needed <= available_bytes:
        return
    parts = [
        f"{role} {format_bytes(weights[role] + kv[role])} ({config.pool(role).replicas} x {config.num_ranks_of(role)}"
        f" ranks, the largest {format_bytes(max(rank.weights + rank.kv for rank in pools[role]))})"
        for role in _ROLES
    ]
    raise ConfigError(
        f"prefill.replicas, decode.replicas: the pools need at least {format_bytes(needed)} of memory and this host"
        f" has {format_bytes(available_bytes)}: {', '.join(parts)}; {_what_works(config, weights, kv, available_bytes)}"
    )


def memory_of_pool(
    config: ClusterConfig, role: str, model: ModelConfig, checkpoint: Checkpoint
) -> tuple[RankBytes, ...]:
    """What each rank of one instance of `role` needs."""
    pool = config.pool(role)
    dtype = model.dtype or "float32" if config.model.dtype == "auto" else config.model.dtype
    layout = model.kv_layout(block_size=config.block_size_of(role), dtype=dtype)
    # Without `max_model_len` the longest request is what the pool turns out to hold.
    min_tokens = config.model.max_model_len or 1
    ranks = []
    for rank in range(pool.num_ranks):
        part = Partition.of(
            model, tensor_parallel=pool.tensor_parallel, pipeline_parallel=pool.pipeline_parallel, rank=rank
        )
        block_bytes = part.shard_layout(layout).block_bytes
        num_blocks = config.num_blocks_of(role)
        if num_blocks is not None:
            pages = num_blocks * block_bytes
        elif config.kv.memory != "auto":
            pages = config.kv.memory
        else:
            pages = layout.num_blocks_for(min_tokens) * block_bytes
        elements = sum(
            math.prod(entry.shape) for name, entry in checkpoint.entries.items() if _is_held(name, part, model)
        )
        ranks.append(RankBytes(elements * DTYPE_BYTES[dtype] // pool.tensor_parallel, pages))
    return tuple(ranks)


def _is_held(name: str, part: Partition, model: ModelConfig) -> bool:
    """Whether a rank's stage reads the tensor."""
    if name.startswith("model.layers."):
        layer = name.split(".")[2]
        return layer.isdecimal() and part.layers[0] <= int(layer) < part.layers[1]
    if name == _EMBED:
        return part.is_first_stage or (part.is_last_stage and model.tie_word_embeddings)
    if name == _HEAD:
        return part.is_last_stage and not model.tie_word_embeddings
    return part.is_last_stage


def _what_works(config: ClusterConfig, weights: dict[str, int], kv: dict[str, int], available_bytes: int) -> str:
    of_one = sum((weights[role] + kv[role]) // config.pool(role).replicas for role in _ROLES if weights[role])
    if of_one <= available_bytes and config.prefill.replicas + config.decode.replicas > 2:
        pairs = available_bytes // of_one
        return f"what works: {pairs} {'replica' if pairs == 1 else 'replicas'} of each"
    room_bytes = available_bytes - sum(weights.values())
    if room_bytes > 0 and config.kv.num_blocks is not None:
        return f"what works: kv.num_blocks up to about {config.kv.num_blocks * room_bytes // sum(kv.values())}"
    own_blocks = [role for role in _ROLES if config.pool(role).num_blocks is not None]
    if room_bytes > 0 and own_blocks:
        share = room_bytes / sum(kv.values())
        most = (
            f"{role}.num_blocks up to about {int((config.num_blocks_of(role) or 0) * share)}" for role in own_blocks
        )
        return f"what works: {', '.join(most)}"
    if room_bytes > 0 and config.kv.memory != "auto":
        return f"what works: kv.memory up to about {format_bytes(room_bytes // config.num_worker_ranks)}"
    if room_bytes > 0 and config.model.max_model_len is not None:
        num_tokens = config.model.max_model_len * room_bytes // sum(kv.values())
        return f"what works: model.max_model_len up to about {num_tokens}, or a smaller model"
    return "serve a smaller model, or use more machines with launcher: ray and ray.address"
