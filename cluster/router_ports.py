"""The ports that all routers of a cluster share, found once, before any of them starts, and held while it runs."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from baton.config import ClusterConfig, split_host_port
from baton.errors import ConfigError

__all__ = ["held_router_ports"]


@contextmanager
def held_router_ports(config: ClusterConfig) -> Iterator[ClusterConfig]:
    """The configuration with free ports in place of port 0, so that all routers, restarted ones too, agree on them.

    The sockets that hold them are bound and never listen: no connection comes to them, and nobody else gets the port
    while no router lives.

    Raises:
        ConfigError: an address cannot be bound.
    """
    with ExitStack() as stack:
        found = {}
        for key in ("http", "grpc"):
            address = getattr(config.router, key)
            host, _ = split_host_port(address)
            try:
                holder = stack.enter_context(_hold(address))
            except OSError as error:
                raise ConfigError(f"router.{key}: cannot bind {address}: {error.strerror or error}") from error
            port = holder.getsockname()[1]
            found[key] = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        yield config.model_copy(update={"router": config.router.model_copy(update=found)})


def _hold(address: str) -> socket.socket:
    host, port = split_host_port(address)
    family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    holder = socket.socket(family, kind)
    try:
        # The first lets a router listen that shares with nobody, the second those that share.
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        holder.bind(place)
    except OSError:
        holder.close()
        raise
    return holder
