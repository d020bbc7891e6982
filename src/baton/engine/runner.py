"""One model on one device: loads it, owns its KV pool, and runs steps. Knows no scheduler and no network.

Interface: `forward(batch)` gives fp32 logits of the rows that the batch asks for; `on_layers` hears of each group of
layers whose KV is written, so that pages can leave while later layers are computed. Not safe for calls from two
threads at once; K and V of a step are written only by `forward`.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from baton.engine.batch_buffers import BatchBuffers, SequenceRows, WantsLogits
from baton.engine.checkpoint import Checkpoint
from baton.engine.fixed_rows import fix_rows, rows_are_fixed
from baton.engine.graph_buckets import GraphBuckets
from baton.engine.kv_cache import allocate_kv, plan_num_blocks
from baton.engine.kv_memory import auto_fraction
from baton.engine.linear import kernel_error, rows_are_invariant
from baton.engine.memory_profile import CudaMeter, measured_kv_bytes
from baton.engine.model import ForwardBatch, LlamaModel, OnLayers
from baton.engine.model_config import ModelConfig
from baton.engine.native_layers import native_layers
from baton.engine.parallel import Shard, Stage, local_linear, parallelize
from baton.engine.rope import rope_tables
from baton.engine.weights import Progress, load_weights
from baton.errors import CheckpointError, ConfigError
from baton.kernels import ops

__all__ = ["BatchBuffers", "ForwardBatch", "ModelRunner", "OnLayers", "SequenceRows", "WantsLogits"]

_log = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Share of the largest logit by which compiled kernels may differ from the reference: rounding, with room to spare.
_PROBE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
_STORED_DTYPES = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}


class ModelRunner:
    """A loaded model with its KV pool.

    Attributes:
        config: the architecture, of the whole model.
        device: where it runs.
        dtype: of weights, activations and KV.
        layout: of the instance's KV pages, all ranks together.
        kv: the pool [num_blocks, num_layers, 2, Hk, block_size, D] of this rank's layers and heads.
        stage: exchange with other stages and what it cost; None for an instance of one rank.
        num_blocks, vocab_size: sizes.
        eos_token_ids: end of text, from the generation configuration.
        max_model_len: tokens of the longest sequence, prompt and output.
        buffers: builds batches for `forward`.
        fingerprint: identity of architecture and weights; peers with equal ones may exchange pages of equal layout.
        weight_bytes: of the checkpoint.
        scratch_block: a block behind those of `kv`, for padding rows; None where there is none.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        block_size: int = 16,
        num_blocks: int | None = None,
        kv_memory_bytes: int | None = None,
        max_batch_tokens: int = 2048,
        max_batch_size: int = 64,
        max_model_len: int | None = None,
        workers_on_host: int = 1,
        progress: Progress | None = None,
        shard: Shard | None = None,
        quantization: ops.Quantization = "none",
        deterministic: bool = False,
        memory_fraction: float | None = None,
        graph_buckets: GraphBuckets | None = None,
        has_scratch_block: bool | None = None,
    ) -> None:
        """
        Args:
            model_dir: a Hugging Face folder with config.json and safetensors.
            dtype: "float32", "bfloat16", "float16", or "auto" for the checkpoint's.
            device: "cpu", "cuda", "cuda:N", or "auto" for CUDA where there is one.
            num_blocks, kv_memory_bytes, workers_on_host: size of the pool, see `plan_num_blocks`. On CUDA, where
                neither of the first two is given, the pool gets what the largest step leaves of `memory_fraction`.
            max_batch_tokens, max_batch_size: the largest step.
            max_model_len: tokens; more than the model's `max_position_embeddings` or than the pool holds is refused.
                None takes the smaller of the two.
            progress: told about (bytes loaded, bytes in all, tensor name).
            shard: this rank's place where several ranks hold the model; the other settings are equal on all of them.
                The pool gets as many blocks as the rank with the fewest has room for.
            quantization: "int8" or "int4" rounds the linear layers' weights while loading; on CPU only.
            deterministic: on CUDA, a row's bits do not depend on the batch (slower); on CPU they never do.
            memory_fraction: of the GPU's memory, for everything of this rank; None shares 0.9 of it out among
                `workers_on_host`.
            graph_buckets: batch sizes of the CUDA graphs that will be recorded, for which memory is left.
            has_scratch_block: whether the pool has a block more for padding rows; None: on CUDA, for a lone rank.

        Raises:
            CheckpointError: the folder is missing, damaged or of an unsupported kind.
            ConfigError: a setting does not fit the model or the machine.
        """
        self.config = ModelConfig.from_dir(model_dir)
        checkpoint = Checkpoint.from_dir(model_dir)
        self.device = _resolve_device(device)
        if self.device.type == "cpu":
            # The kernels' thread pool gets the size of torch's, which OMP_NUM_THREADS sets.
            ops.set_num_threads(torch.get_num_threads())
        dtype_name = _resolve_dtype(dtype, self.config, checkpoint)
        self.dtype = _DTYPES[dtype_name]
        _check_max_model_len(max_model_len, self.config)
        self.vocab_size = self.config.vocab_size
        self.eos_token_ids = self.config.eos_token_ids
        self.layout = layout = self.config.kv_layout(block_size=block_size, dtype=dtype_name)
        own_config = self.config
        if shard is not None:
            if self.device.type == "cuda":
                shard.group.connect_device(self.device)
            part = shard.partition
            self.layout = replace(
                layout,
                tensor_parallel=part.tensor_parallel,
                pipeline_parallel=part.pipeline_parallel,
                layers_per_stage=part.layers_per_stage,
            )
            own_config, layout = part.shard_config(self.config), part.shard_layout(layout)
        if quantization != "none" and self.device.type != "cpu":
            raise ConfigError(f"model.quantization is {quantization}, which needs device cpu, got {self.device}")
        self._quantization: ops.Quantization = quantization
        rounding = "" if quantization == "none" else f"/{quantization}"
        self.fingerprint = self.config.fingerprint(checkpoint.digest() + rounding)
        self.weight_bytes = sum(entry.num_bytes for entry in checkpoint.entries.values())
        self.max_batch_size = max_batch_size
        self.max_batch_tokens = max_batch_tokens
        with torch.inference_mode():
            weights = load_weights(
                self.config,
                checkpoint,
                dtype=self.dtype,
                device=self.device,
                progress=progress,
                partition=None if shard is None else shard.partition,
                quantization=quantization,
            )
            self._deterministic = deterministic and self.device.type == "cuda"
            if self._deterministic:
                weights = fix_rows(weights)
            if shard is not None:
                weights = parallelize(self.config, weights, shard)
        if self.device.type == "cuda" and num_blocks is None and kv_memory_bytes is None:
            if shard is not None:
                # Ranks take part in each other's step: all have loaded.
                shard.group.all_gather_ints([0], shard.load_s)
            kv_memory_bytes = measured_kv_bytes(
                CudaMeter(self.device),
                own_config,
                weights,
                block=allocate_kv(layout, 1, dtype=self.dtype, device=self.device),
                max_batch_tokens=max_batch_tokens,
                max_batch_size=max_batch_size,
                fraction=memory_fraction or auto_fraction(workers_on_host, torch.cuda.device_count()),
                graph_buckets=graph_buckets or GraphBuckets(()),
            )
        self.num_blocks = plan_num_blocks(
            layout,
            num_blocks=num_blocks,
            memory_bytes=kv_memory_bytes,
            min_tokens=max_model_len or 1,
            device=self.device,
            workers_on_host=workers_on_host,
        )
        if shard is not None:
            self.num_blocks = _agree(shard, self.num_blocks)
        # Not in inference mode: pages that arrive are written by other threads in plain torch.
        if has_scratch_block is None:
            has_scratch_block = self.device.type == "cuda" and shard is None
        self.scratch_block = self.num_blocks if has_scratch_block else None
        pool = allocate_kv(layout, self.num_blocks, dtype=self.dtype, device=self.device, has_scratch=has_scratch_block)
        self.kv = pool[: self.num_blocks]
        self._kv_layers = [pool[:, layer] for layer in range(own_config.num_layers)]
        window = self.config.max_position_embeddings
        self.max_model_len = max_model_len or min(window, self.num_blocks * block_size)
        with torch.inference_mode():
            cos, sin = rope_tables(
                self.config.rope,
                head_dim=self.config.head_dim,
                num_positions=self.max_model_len,
                device=self.device,
            )
            decoder = native_layers(
                own_config,
                weights,
                cos,
                sin,
                self._kv_layers,
                max_rows=max_batch_tokens,
                max_logit_rows=max_batch_size,
            )
        self._model = LlamaModel(own_config, weights, cos, sin, decoder, deterministic=self._deterministic)
        self.stage = (
            None
            if shard is None
            else Stage(shard, hidden_size=self.config.hidden_size, dtype=self.dtype, device=self.device)
        )
        self.buffers = BatchBuffers(
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            max_model_len=self.max_model_len,
            block_size=block_size,
            device=self.device,
        )

    @torch.inference_mode()
    def forward(
        self,
        batch: ForwardBatch,
        on_layers: OnLayers | None = None,
        layers_per_group: int = 4,
        out: Tensor | None = None,
    ) -> Tensor:
        """Run one step: write K and V of the batch's tokens, return logits of the rows it asks for.

        Args:
            batch: from `buffers.build`.
            on_layers: called with (begin, end) on this thread once the KV of layers begin..end-1 is written (on CUDA:
                enqueued on the current stream). Of several stages, each hears of its own layers, numbered within the
                stage.
            layers_per_group: how many layers make a group; the last group may be smaller.
            out: fp32 [R, vocab_size] where the result may go; look at what is returned.

        Returns:
            fp32 [R, vocab_size] on the runner's device; read it, do not write to it, and copy what the next but one
            step must not overwrite. Of several ranks, the driver alone gets rows.

        Raises:
            DeadlineError, UnavailableError: another rank of this instance is gone or hangs.
        """
        stage = self.stage
        hidden = None if stage is None else stage.receive(batch.token_ids.shape[0])
        if stage is not None and not stage.is_last:
            # The next stage needs every token's row.
            every_row = torch.arange(batch.token_ids.shape[0], device=self.device)
            batch = replace(batch, logit_rows=every_row)
            rows = self._model.forward(batch, self._kv_layers, on_layers, layers_per_group, hidden)
            # They are on their way while the next step writes to the model's buffers.
            stage.send(rows.clone())
            return torch.empty((0, self.vocab_size), device=self.device)
        rows = self._model.forward(batch, self._kv_layers, on_layers, layers_per_group, hidden)
        return self._model.logits(rows, out)

    def warm_up(self) -> bool | None:
        """Run a small prefill and decode step in block 0, whose content is lost; call it before serving.

        Of several ranks all call it at once (`ParallelRunner.warm_up` sees to that).

        On CPU the compiled kernels are also held against the reference on this very processor, so that a build that
        computes something else here is refused instead of answering with wrong tokens.

        Returns:
            whether the linear layers' rows are bit-equal for every batch size tried (a warning is logged where they
            are not); None on CUDA, where nothing is promised unless `deterministic` is asked for.

        Raises:
            ConfigError: the compiled kernels and the reference disagree, or rows differ and must not.
        """
        logits = self._probe()
        if self.device.type != "cpu":
            return self._check_deterministic() if self._deterministic else None
        if ops.backend() != "reference":
            with ops.use_backend("reference"):
                expected = self._probe()
            error = (
                0.0
                if not len(logits)
                else float((logits - expected).abs().max() / expected.abs().max().clamp_min(1e-6))
            )
            error = max(error, kernel_error(self.dtype, self._quantization))
            if not error <= _PROBE_TOLERANCE[self.dtype]:
                raise ConfigError(
                    f"the compiled kernels ({ops.backend()}) differ from the reference by {error:.3g} of the largest"
                    f" logit on this processor, more than {_PROBE_TOLERANCE[self.dtype]}; start with"
                    " BATON_KERNELS=reference (slow), or another of " + ", ".join(ops.available_backends())
                )
        is_invariant = all(rows_are_invariant(local_linear(linear)) for linear in self._model.linears())
        if not is_invariant:
            _log.warning("linear layers give other bits for other batch sizes on this processor: tokens may differ")
        return is_invariant

    def _check_deterministic(self) -> bool:
        for linear in self._model.linears():
            local = local_linear(linear)
            if not rows_are_fixed(local, self.device):
                raise ConfigError(
                    f"deterministic: true, but rows of a linear layer {local.in_features} -> {local.out_features} of"
                    f" {self.dtype} depend on their place in the batch on {self.device}; set deterministic: false"
                )
        return True

    def _probe(self) -> Tensor:
        """Logits of a prompt in block 0 and of one token after it: fp32 [tokens, vocab_size]."""
        count = min(self.layout.block_size, self.max_batch_tokens + 1, self.max_model_len)
        token_ids = [(7919 * i + 11) % self.vocab_size for i in range(count)]
        head = max(1, count - 1)
        logits = self.forward(self.buffers.build([SequenceRows(token_ids[:head], 0, [0], "all")])).clone()
        if head < count:
            last = self.forward(self.buffers.build([SequenceRows(token_ids[head:], head, [0])]))
            logits = torch.cat([logits, last])
        return logits


def _agree(shard: Shard, num_blocks: int) -> int:
    """The blocks that every rank has room for; waits until all have loaded.

    Raises:
        ConfigError: ranks were started with different splits of the layers.
    """
    part = shard.partition
    all_ranks = shard.group.all_gather_ints([num_blocks, *part.layers], shard.load_s)
    stages = [tuple(values[1:]) for values in all_ranks]
    ends = [0, *(end for _, end in stages[:: part.tensor_parallel])]
    expected = [(ends[rank // part.tensor_parallel], end) for rank, (_, end) in enumerate(stages)]
    if stages != expected or any(stages[rank] != part.layers for rank in part.tensor_ranks):
        raise ConfigError(
            f"rank {part.rank}: the ranks of this instance hold layers {stages}; start all of them with the same"
            " tensor_parallel, pipeline_parallel and layers_per_stage"
        )
    return min(values[0] for values in all_ranks)


def _resolve_device(device: str) -> torch.device:
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        resolved = torch.device("meta")
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"device = {device!r} is not supported; supported: auto, cpu, cuda")
    if resolved.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device = {device!r}, but no CUDA device is visible; use device: cpu or auto")
    return resolved


def _resolve_dtype(dtype: str, config: ModelConfig, checkpoint: Checkpoint) -> str:
    if dtype == "auto":
        if config.dtype is not None:
            return config.dtype
        entry = next(iter(checkpoint.entries.values()), None)
        stored = None if entry is None else _STORED_DTYPES.get(entry.dtype)
        if stored is None:
            raise CheckpointError(f"{checkpoint.folder}: config.json names no dtype and the weights give none; set it")
        return stored
    if dtype not in _DTYPES:
        raise ConfigError(f"model.dtype = {dtype!r} is not supported; supported: auto, {', '.join(_DTYPES)}")
    return dtype


def _check_max_model_len(max_model_len: int | None, config: ModelConfig) -> None:
    limit = config.max_position_embeddings
    if max_model_len is not None and not 1 <= max_model_len <= limit:
        raise ConfigError(f"model.max_model_len = {max_model_len} must be in 1..{limit}, the model's window")
