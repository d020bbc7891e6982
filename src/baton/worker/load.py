"""Builds a worker's engine from the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.config import ClusterConfig, PoolConfig, resolve_model_path
from baton.engine.engine import Engine
from baton.engine.runner import ModelRunner
from baton.errors import ConfigError

__all__ = ["build_engine"]

_log = logging.getLogger(__name__)
_AUTO_LAYERS_PER_GROUP = 4


def build_engine(config: ClusterConfig, pool: PoolConfig, progress: Callable[[str, float], None]) -> Engine:
    """Loads the model, allocates the KV pool and warms up; blocks for seconds.

    Args:
        pool: `config.prefill` or `config.decode`.
        progress: told (what is being done, fraction of start-up done) from the calling thread.

    Raises:
        CheckpointError, ConfigError: the model cannot be served as configured.
    """

    def weights_progress(done: int, total: int, name: str) -> None:
        progress(f"loading weights {done}/{total}", 0.1 + 0.7 * done / max(1, total))

    progress("reading the model's configuration", 0.05)
    group = config.transfer.layers_per_group
    memory = None if config.kv.memory == "auto" else config.kv.memory
    runner = ModelRunner(
        resolve_model_path(config.model.path),
        dtype=config.model.dtype,
        device=config.device,
        block_size=pool.block_size or config.kv.block_size,
        num_blocks=pool.num_blocks or config.kv.num_blocks,
        kv_memory_bytes=memory,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size,
        max_model_len=config.model.max_model_len,
        progress=weights_progress,
    )
    room = runner.num_blocks * runner.layout.block_size
    if room < runner.max_model_len:
        raise ConfigError(
            f"{runner.num_blocks} KV blocks of {runner.layout.block_size} hold {room} tokens, but one request may have"
            f" {runner.max_model_len} (model.max_model_len); raise kv.memory or kv.num_blocks, or lower"
            " model.max_model_len"
        )
    progress("warming up", 0.85)
    runner.warm_up()
    _log.info("KV pool: %d blocks of %d tokens", runner.num_blocks, runner.layout.block_size)
    return Engine(
        runner,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size,
        layers_per_group=_AUTO_LAYERS_PER_GROUP if group == "auto" else group,
    )
