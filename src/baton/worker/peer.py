"""Who this worker is towards the other half of a handover."""

from __future__ import annotations

from baton.engine.engine import Engine
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.transports.select import host_id
from baton.worker.runtime import WorkerRuntime

__all__ = ["local_peer"]


def local_peer(runtime: WorkerRuntime, engine: Engine) -> LocalPeer:
    """This worker's identity and what its pages look like."""
    return LocalPeer(
        instance_id=runtime.instance_id,
        incarnation=runtime.incarnation,
        model_fingerprint=engine.runner.fingerprint,
        layout=engine.runner.layout,
        host_id=host_id(),
    )
