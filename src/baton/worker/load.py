"""Builds what a rank computes with from the configuration."""

from __future__ import annotations

import logging
from collections.abc import Callable

from baton.config import ClusterConfig, GpuConfig, PoolConfig, format_bytes, resolve_model_path
from baton.engine.core_board import at_work
from baton.engine.engine import Engine
from baton.engine.graph_buckets import GraphBuckets
from baton.engine.graph_capture import CudaGraphs
from baton.engine.load_remains import give_back_load_remains
from baton.engine.model_config import ModelConfig
from baton.engine.parallel import Shard
from baton.engine.parallel_runner import ParallelRunner
from baton.engine.partition import plan_layers
from baton.engine.runner import ModelRunner
from baton.engine.step_launcher import StepLauncher
from baton.errors import BatonError

__all__ = ["build_engine", "build_parallel_engine", "build_runner", "connect_shard"]

_log = logging.getLogger(__name__)
_AUTO_LAYERS_PER_GROUP = 4
_STEP_DEADLINE_S = 60.0
"""How long ranks of one instance wait for each other within a step."""

OnProgress = Callable[[str, float], None]


def connect_shard(
    config: ClusterConfig, pool: PoolConfig, *, rank: int, host: str, store_address: str, group_name: str
) -> Shard:
    """Meets the instance's other ranks, which call this too; blocks until all are there.

    Raises:
        ConfigError: the model cannot be split so.
        UnavailableError: the others did not show up within `startup_timeout_s`.
    """
    model = ModelConfig.from_dir(resolve_model_path(config.model.path))
    store_host, _, store_port = store_address.rpartition(":")
    return Shard.connect(
        model,
        tensor_parallel=pool.tensor_parallel,
        pipeline_parallel=pool.pipeline_parallel,
        rank=rank,
        store_host=store_host.removeprefix("[").removesuffix("]"),
        store_port=int(store_port),
        own_host=host,
        name=group_name,
        deadline_s=_STEP_DEADLINE_S,
        connect_s=config.startup_timeout_s,
        # Of a prompt's tokens the head sees the last one only.
        layers_per_stage=plan_layers(
            model, pool.pipeline_parallel, sampled_share=0.0 if pool is config.prefill else 1.0
        ),
    )


def build_runner(
    config: ClusterConfig, pool: PoolConfig, progress: OnProgress, shard: Shard | None = None
) -> ModelRunner:
    """Loads this rank's part of the model and allocates its KV pool; blocks for seconds.

    Args:
        pool: `config.prefill` or `config.decode`.
        progress: told (what is being done, fraction of start-up done) from the calling thread.

    Raises:
        CheckpointError, ConfigError: the model cannot be served as configured.
    """

    def weights_progress(done_bytes: int, total_bytes: int, name: str) -> None:
        text = f"loading weights, {format_bytes(done_bytes)} of {format_bytes(total_bytes)}"
        progress(text, 0.1 + 0.7 * done_bytes / max(1, total_bytes))

    gpu = _gpu(config, pool)
    progress("reading the model's configuration", 0.05)
    runner = ModelRunner(
        resolve_model_path(config.model.path),
        dtype=config.model.dtype,
        quantization=config.model.quantization,
        device=config.device,
        block_size=pool.block_size or config.kv.block_size,
        num_blocks=pool.num_blocks or config.kv.num_blocks,
        kv_memory_bytes=None if config.kv.memory == "auto" else config.kv.memory,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size,
        max_model_len=config.model.max_model_len,
        workers_on_host=config.num_worker_ranks,
        progress=weights_progress,
        shard=shard,
        deterministic=config.deterministic,
        memory_fraction=None if gpu.memory_fraction == "auto" else gpu.memory_fraction,
        graph_buckets=_graph_buckets(config, pool) if shard is None else None,
    )
    give_back_load_remains()
    progress("warming up", 0.85)
    _log.info("KV pool: %d blocks of %d tokens", runner.num_blocks, runner.layout.block_size)
    return runner


def build_engine(config: ClusterConfig, pool: PoolConfig, progress: OnProgress) -> Engine:
    """The engine of an instance of one rank. Raises as `build_runner`."""
    with at_work():
        runner = build_runner(config, pool, progress)
        runner.warm_up()
        launcher = _build_launcher(config, pool, runner, progress) if runner.device.type == "cuda" else None
    return Engine(
        runner,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size,
        layers_per_group=_layers_per_group(config),
        max_prefill_tokens=_max_prefill_tokens(config, pool),
        launcher=launcher,
        overlap=_gpu(config, pool).overlap,
    )


def build_parallel_engine(
    config: ClusterConfig,
    pool: PoolConfig,
    progress: OnProgress,
    shard: Shard,
    on_broken: Callable[[BatonError], None],
) -> tuple[Engine, ParallelRunner]:
    """The driver's engine over all ranks; the others run `run_follower`.

    Args:
        on_broken: told once, on any thread, when the instance has lost a rank.

    Raises:
        as `build_runner`, and UnavailableError, DeadlineError when a rank was lost.
    """
    with shard.reporting(), at_work():
        parallel = ParallelRunner(build_runner(config, pool, progress, shard), shard, on_broken=on_broken)
        parallel.warm_up()
    engine = Engine(
        parallel,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size,
        layers_per_group=_layers_per_group(config),
        max_steps_in_flight=parallel.max_steps_in_flight,
        max_prefill_tokens=_max_prefill_tokens(config, pool),
    )
    return engine, parallel


def _build_launcher(config: ClusterConfig, pool: PoolConfig, runner: ModelRunner, progress: OnProgress) -> StepLauncher:
    buckets = _graph_buckets(config, pool)
    launcher = StepLauncher(
        runner,
        max_batch_tokens=pool.max_batch_tokens,
        max_batch_size=pool.max_batch_size,
        graphs=CudaGraphs(runner.device) if buckets.sizes else None,
        buckets=buckets,
    )

    def on_capture(done: int, total: int) -> None:
        progress(f"recording CUDA graphs, {done} of {total}", 0.85 + 0.14 * done / total)

    launcher.warm_up(on_capture)
    return launcher


def _graph_buckets(config: ClusterConfig, pool: PoolConfig) -> GraphBuckets:
    """Batch sizes to record; a prefill worker has no decode steps."""
    records = _gpu(config, pool).cuda_graphs and pool is config.decode
    return GraphBuckets.up_to(pool.max_batch_size) if records else GraphBuckets(())


def _gpu(config: ClusterConfig, pool: PoolConfig) -> GpuConfig:
    return pool.gpu or config.gpu


def _max_prefill_tokens(config: ClusterConfig, pool: PoolConfig) -> int | None:
    """What a decode worker may add to a step of running answers; a prefill worker has none."""
    return config.max_local_prefill_tokens if pool is config.decode else None


def _layers_per_group(config: ClusterConfig) -> int:
    group = config.transfer.layers_per_group
    return _AUTO_LAYERS_PER_GROUP if group == "auto" else group
