"""Measures what the largest step needs on a GPU: runs it once, before there is a KV pool, and reads torch's peak.

Its sequences all write into one block, whose content means nothing: memory and time of a step depend on its sizes only.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from baton.engine.graph_buckets import GraphBuckets
from baton.engine.kv_memory import DeviceMemory, graph_bytes, plan_kv_bytes
from baton.engine.model import ForwardBatch, LlamaModel
from baton.engine.model_config import ModelConfig
from baton.engine.rope import rope_tables
from baton.engine.weights import ModelWeights

__all__ = ["CudaMeter", "MemoryMeter", "largest_batch", "measured_kv_bytes", "run_largest_step"]

_log = logging.getLogger(__name__)


class MemoryMeter(Protocol):
    """Readings of a GPU."""

    def measure(self, run: Callable[[], None]) -> DeviceMemory:
        """Runs `run` and reads the memory before, at most during, and after it."""
        ...


class CudaMeter:
    """torch's own statistics, and the driver's."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def measure(self, run: Callable[[], None]) -> DeviceMemory:
        """See `MemoryMeter`."""
        device = self._device
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        run()
        torch.cuda.synchronize(device)
        peak = torch.cuda.max_memory_allocated(device)
        torch.cuda.empty_cache()
        free, total = torch.cuda.mem_get_info(device)
        return DeviceMemory(total=total, free=free, weights=before, step=peak - before)


def largest_batch(
    *, max_batch_tokens: int, max_batch_size: int, max_length: int, block_size: int, device: torch.device
) -> ForwardBatch:
    """A prefill step of `max_batch_tokens`, in sequences as long as can be, that fits a pool of one block."""
    starts = list(range(0, max_batch_tokens, max_length))
    lengths = [min(max_length, max_batch_tokens - start) for start in starts]
    positions = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    num_wanted = min(max_batch_tokens, max_batch_size)
    return ForwardBatch(
        token_ids=torch.zeros(max_batch_tokens, dtype=torch.int64, device=device),
        positions=positions.to(device),
        slots=torch.arange(max_batch_tokens, device=device) % block_size,
        block_tables=torch.zeros((len(starts), -(-max(lengths) // block_size)), dtype=torch.int32, device=device),
        query_start=torch.tensor([*starts, max_batch_tokens], dtype=torch.int32, device=device),
        context_lens=torch.tensor(lengths, dtype=torch.int32, device=device),
        logit_rows=torch.arange(max_batch_tokens - num_wanted, max_batch_tokens, device=device),
    )


@torch.inference_mode()
def run_largest_step(
    config: ModelConfig,
    weights: ModelWeights,
    *,
    max_batch_tokens: int,
    max_batch_size: int,
    kv: Tensor,
) -> None:
    """Runs `largest_batch` through a rank's layers and, where it has one, its head; nothing leaves the rank's stage.

    Args:
        kv: a pool of one block [1, num_layers, 2, Hk, block_size, D].
    """
    device = kv.device
    max_length = min(max_batch_tokens, config.max_position_embeddings)
    cos, sin = rope_tables(config.rope, head_dim=config.head_dim, num_positions=max_length, device=device)
    batch = largest_batch(
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        max_length=max_length,
        block_size=kv.shape[4],
        device=device,
    )
    hidden = None
    if weights.embed is None:
        hidden = torch.zeros((max_batch_tokens, config.hidden_size), dtype=kv.dtype, device=device)
    model = LlamaModel(config, weights, cos, sin)
    rows = model.forward(batch, [kv[:, layer] for layer in range(config.num_layers)], hidden=hidden)
    if weights.lm_head is not None:
        model.logits(rows)


def measured_kv_bytes(
    meter: MemoryMeter,
    config: ModelConfig,
    weights: ModelWeights,
    *,
    block: Tensor,
    max_batch_tokens: int,
    max_batch_size: int,
    fraction: float,
    graph_buckets: GraphBuckets,
) -> int:
    """What the largest step leaves for the KV pool, in bytes.

    Args:
        config: of this rank's layers.
        block: a pool of one block, for this only.
        fraction, graph_buckets: see `kv_memory.py`.

    Raises:
        ConfigError: it leaves nothing.
    """

    def run() -> None:
        run_largest_step(config, weights, max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size, kv=block)

    # Once before: what libraries set up at first is not a step's.
    run()
    memory = meter.measure(run)
    graphs = graph_bytes(
        graph_buckets, step=memory.step, max_batch_tokens=max_batch_tokens, vocab_size=config.vocab_size
    )
    kv_bytes = plan_kv_bytes(memory, fraction=fraction, graphs=graphs)
    _log.info(
        "GPU memory in MiB: %d in all, %d free; weights %d, largest step %d, graphs %d, KV %d",
        *(size >> 20 for size in (memory.total, memory.free, memory.weights, memory.step, graphs, kv_bytes)),
    )
    return kv_bytes
