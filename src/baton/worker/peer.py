"""Who a rank is towards the other half of a handover, and how pages reach it."""

from __future__ import annotations

from baton.config import ClusterConfig
from baton.engine.engine import Runner
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.transports.base import Transport
from baton.kv_transfer.transports.select import host_id, make_transports
from baton.placement import Placement

__all__ = ["local_peer", "rank_transports"]


def local_peer(placement: Placement, incarnation: bytes, runner: Runner) -> LocalPeer:
    """This rank's identity and what its instance's pages look like."""
    return LocalPeer(
        instance_id=placement.instance_id,
        incarnation=incarnation,
        model_fingerprint=runner.fingerprint,
        layout=runner.layout,
        host_id=host_id(),
        rank=placement.rank,
    )


def rank_transports(config: ClusterConfig, placement: Placement, device: str) -> tuple[Transport, ...]:
    """The transports of a rank, best first, as configured.

    Args:
        device: of the KV pool, as torch writes it.

    Raises:
        ConfigError: nothing of what is configured works here.
    """
    transfer = config.transfer
    return make_transports(
        transfer.transport,
        host=placement.host,
        arena_bytes=transfer.arena,
        rate_limit_gbit_s=transfer.rate_limit_gbit_s,
        device=device,
    )
