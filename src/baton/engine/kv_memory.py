"""How much of a GPU's memory the KV pool may take. Pure.

    budget = total * fraction                   what this rank may use, all in all
    KV     = budget - context - weights - step - graphs - buffers

The fraction is what lets several ranks share a GPU: each stays within its own, whatever the others do meanwhile. So
nothing here is taken from the difference of two readings of the GPU's free memory, which others change too; that only
has a last word where the GPU does not have what the budget promises.

`step` is measured (`memory_profile.py`): what the largest prefill step needs beside weights and pool.
"""

from __future__ import annotations

from dataclasses import dataclass

from baton.engine.graph_buckets import GraphBuckets
from baton.errors import ConfigError

__all__ = ["CONTEXT_BYTES", "DeviceMemory", "auto_fraction", "graph_bytes", "plan_kv_bytes"]

CONTEXT_BYTES = 768 << 20
"""A process's CUDA context, loaded kernels and library workspaces outside of torch's allocator: an allowance."""
_AUTO_FRACTION = 0.9
_GRAPH_BYTES = 8 << 20
"""Of each recorded graph's own description on the device: an allowance."""
_MIB = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceMemory:
    """Readings of one GPU and of this process's share in it, in bytes.

    Attributes:
        total, free: of the GPU; free now, with the weights loaded and nothing else.
        weights: allocated by this process, before the pool.
        step: what the largest step has had allocated at once beside that.
    """

    total: int
    free: int
    weights: int
    step: int


def auto_fraction(num_ranks: int, num_gpus: int) -> float:
    """The share of each rank where `num_ranks` spread evenly over `num_gpus`."""
    return _AUTO_FRACTION / -(-num_ranks // max(1, num_gpus))


def graph_bytes(buckets: GraphBuckets, *, step: int, max_batch_tokens: int, vocab_size: int) -> int:
    """What graphs of `buckets` and their buffers will take.

    Args:
        step: bytes of a step of `max_batch_tokens`; a decode step needs its part of them.
    """
    if not buckets.sizes:
        return 0
    own = -(-step * buckets.largest // max_batch_tokens)
    logits = 4 * buckets.largest * vocab_size
    return own + logits + len(buckets.sizes) * _GRAPH_BYTES


def plan_kv_bytes(memory: DeviceMemory, *, fraction: float, graphs: int, context: int = CONTEXT_BYTES) -> int:
    """Bytes for the KV pool.

    Args:
        fraction: of the GPU's memory, for everything of this rank.
        graphs: see `graph_bytes`.

    Raises:
        ConfigError: the weights and one step fill the budget, or others hold the memory.
    """
    budget = int(memory.total * fraction)
    fixed = context + memory.weights + memory.step + graphs
    if budget <= fixed:
        raise ConfigError(
            f"gpu.memory_fraction = {fraction:.3g} of {memory.total // _MIB} MiB is {budget // _MIB} MiB, and weights"
            f" ({memory.weights // _MIB} MiB), the largest step ({memory.step // _MIB} MiB), graphs"
            f" ({graphs // _MIB} MiB) and CUDA itself ({context // _MIB} MiB) leave nothing of it for KV; raise"
            " gpu.memory_fraction, lower max_batch_tokens, or use more GPUs"
        )
    left = memory.free - memory.step - graphs
    if left <= 0:
        raise ConfigError(
            f"{memory.free // _MIB} MiB of the GPU are free once the weights are loaded, and a step with its graphs"
            f" needs {(memory.step + graphs) // _MIB} MiB; other processes hold the rest: lower their"
            " gpu.memory_fraction, or stop them"
        )
    return min(budget - fixed, left)
