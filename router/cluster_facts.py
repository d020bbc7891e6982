"""The cluster as one engine, for who scrapes a router as if it were one: sums and means over the workers. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from baton.router.instances import Instance
from baton.vllm_metrics import EngineFacts

__all__ = ["cluster_facts"]


def cluster_facts(instances: Iterable[Instance], queued: float) -> EngineFacts:
    """What the workers report.

    Requests are counted where they are, in either pool. KV cache is that of the decode pool, where answers need it:
    all its blocks, and how many of them are owned.

    Args:
        queued: requests that wait in the router, before any worker has them.
    """
    running = waiting = 0
    owned = total = block_size = 0
    for instance in instances:
        load = instance.load
        running += load.running_requests
        waiting += load.waiting_requests
        if instance.status.role == "decode":
            owned += load.kv_blocks_owned
            total += load.kv_blocks_total
            block_size = instance.block_size
    return EngineFacts(
        running=running,
        waiting=waiting + queued,
        kv_usage_ratio=owned / total if total else 0.0,
        block_size=block_size,
        num_blocks=total,
    )
