"""The environment of a private Ray. Set before Ray is imported, and gRPC, which read part of it once."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import baton

__all__ = ["set_driver_environment", "set_fork_environment", "set_private_environment"]

_PATIENCE = {"RAY_gcs_rpc_server_reconnect_timeout_s": "1000000"}
_SETTINGS = {
    # Nothing but our few long-lived actors runs there: no idle workers, no reports to anyone.
    "RAY_enable_worker_prestart": "0",
    "RAY_prestart_worker_first_driver": "0",
    "RAY_DISABLE_DOCKER_CPU_WARNING": "1",
    "RAY_usage_stats_enabled": "0",
    "RAY_enable_metrics_collection": "0",
    "RAY_event_stats": "0",
    # The head may be away for as long as it likes: by default every process of Ray ends itself after a minute.
    **_PATIENCE,
    # A token of its own, so that no other user of this machine can speak to it.
    "RAY_AUTH_MODE": "token",
}


def set_fork_environment() -> None:
    """Set, before gRPC is imported, that it does nothing when this process forks.

    Ray starts its head anew by a fork of `baton up`, which has many threads; gRPC's handlers for that crashed most of
    the children (five of six) before they were a head. What is forked here is another program at once.
    """
    os.environ["GRPC_ENABLE_FORK_SUPPORT"] = "0"


def set_private_environment() -> None:
    """Set Ray's switches, a fresh token, and the path on which Ray's workers find this very `baton`."""
    os.environ.update(_SETTINGS, RAY_AUTH_TOKEN=secrets.token_hex(32))
    source = str(Path(baton.__file__).resolve().parent.parent)
    known = [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    if source not in known:
        os.environ["PYTHONPATH"] = os.pathsep.join([source, *known])


def set_driver_environment() -> None:
    """Set what concerns `baton up` alone, as a driver of somebody else's Ray."""
    os.environ.update(_PATIENCE)
