"""Builds a worker's engine from the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.config import ClusterConfig, PoolConfig, format_bytes, resolve_model_path
from baton.engine.engine import Engine
from baton.engine.runner import ModelRunner

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

    def weights_progress(done_bytes: int, total_bytes: int, name: str) -> None:
        text = f"loading weights, {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        progress(text, 0.1 + 0.7 * done_bytes / max(1, total_bytes))

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
        workers_on_host=config.prefill.replicas + config.decode.replicas,
        progress=weights_progress,
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
