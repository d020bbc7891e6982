"""The key-value store at which the two ends of a link meet to make a process group."""

from __future__ import annotations

import socket
from datetime import timedelta
from typing import Any

import torch.distributed

from baton.errors import HandoverError

__all__ = ["host_store"]

# The type stubs of torch cover no stores.
_dist: Any = torch.distributed


def host_store(host: str, timeout_s: float) -> Any:
    """A store that listens on `host` only: by itself it would listen on every interface."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise HandoverError(f"no store can listen on {host}: {error.strerror}") from error
    port = listener.getsockname()[1]
    return _dist.TCPStore(
        host,
        port,
        None,
        True,
        timedelta(seconds=timeout_s),
        wait_for_workers=False,
        master_listen_fd=listener.detach(),
    )
