"""HTTP servers that live in a router's process: one listener, uvicorn without its signals."""

from __future__ import annotations

import contextlib
import socket

import uvicorn

from baton.config import split_host_port
from baton.errors import ConfigError

__all__ = ["EmbeddedServer", "listen", "shown_host"]


class EmbeddedServer(uvicorn.Server):
    """A server that ends when `should_exit` is set."""

    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Signals are the process's business, not this server's."""
        yield


def listen(address: str, *, setting: str, backlog: int, is_shared: bool = False) -> socket.socket:
    """A listener on host:port.

    Args:
        setting: the key of the configuration that `address` is of.
        is_shared: other processes listen there too.

    Raises:
        ConfigError: the address cannot be listened on.
    """
    host, port = split_host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
        listener.listen(backlog)
    except OSError as error:
        listener.close()
        raise ConfigError(f"{setting}: cannot listen on {address}: {error.strerror or error}") from error
    listener.setblocking(False)
    return listener


def shown_host(host: str) -> str:
    """As in a URL."""
    return f"[{host}]" if ":" in host else host
