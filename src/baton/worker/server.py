"""The gRPC server of a worker's rank."""

from __future__ import annotations

import grpc

from baton.errors import UnavailableError

__all__ = ["MAX_MESSAGE_BYTES", "listen", "make_server"]

MAX_MESSAGE_BYTES = 64 << 20
"""Longest message between parts of the cluster; a prompt of a million tokens takes a few MiB."""


def make_server() -> grpc.aio.Server:
    """A server without services or port."""
    return grpc.aio.server(
        options=[
            ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
            ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
            ("grpc.so_reuseport", 0),
            # Routers ping within `router.silence_s`, to notice workers that hang and connections that are half open.
            ("grpc.http2.max_ping_strikes", 0),
            ("grpc.keepalive_permit_without_calls", 1),
            # And a router or prefill worker that vanished without a word is noticed: what it asked for is given up.
            ("grpc.keepalive_time_ms", 10_000),
            ("grpc.keepalive_timeout_ms", 5_000),
            ("grpc.http2.ping_timeout_ms", 5_000),
        ]
    )


async def listen(server: grpc.aio.Server, host: str, port: int, name: str) -> str:
    """Opens the port (0: any free one) and returns host:port.

    Raises:
        UnavailableError: it is taken; `name` says whose it was to be.
    """
    try:
        bound = server.add_insecure_port(f"{host}:{port}")
    except RuntimeError as error:
        raise UnavailableError(f"{name} cannot listen on {host}:{port}: {error}") from error
    await server.start()
    return f"{host}:{bound}"
