"""gRPC options of the router: sizes are bounded both ways, dead peers are noticed, ports are never shared silently."""

from __future__ import annotations

from typing import Final

import grpc

from baton.proto import channels
from baton.router import limits

__all__ = ["is_ping_lost", "open_channel", "open_watched_channel", "server_options"]

_Options = tuple[tuple[str, int], ...]

_SIZES: Final[_Options] = (
    ("grpc.max_receive_message_length", limits.MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_send_message_length", limits.MAX_GRPC_MESSAGE_BYTES),
)
_WORKER_SIZES: Final[_Options] = (
    ("grpc.max_receive_message_length", 4 * limits.MAX_GRPC_MESSAGE_BYTES),
    ("grpc.max_send_message_length", 4 * limits.MAX_GRPC_MESSAGE_BYTES),
)
_CLIENT_OPTIONS: Final[_Options] = (
    *_WORKER_SIZES,
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.http2.ping_timeout_ms", 5_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.enable_retries", 0),
)


def server_options(*, shares_port: bool = False) -> _Options:
    """Of a server; the port is its own unless it is shared on purpose."""
    return (
        *_SIZES,
        ("grpc.max_metadata_size", limits.MAX_HEADER_BYTES),
        ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.so_reuseport", int(shares_port)),
    )


def open_channel(address: str) -> grpc.aio.Channel:
    """A channel to a worker or the registry at host:port, with its own connection."""
    return channels.open_channel(address, [*_CLIENT_OPTIONS, ("grpc.use_local_subchannel_pool", 1)])


def open_watched_channel(address: str, silence_s: float) -> grpc.aio.Channel:
    """A channel whose calls fail when the process at host:port is stopped or cut off for `silence_s` seconds.

    Pings, which the other side's network threads answer without its interpreter, take the place of a stream with beats.
    A worker that hangs still accepts connections, so making one has the same limit.
    """
    silence_ms = round(1000 * silence_s)
    watch = {
        "grpc.keepalive_time_ms": max(1, silence_ms * 4 // 10),
        "grpc.keepalive_timeout_ms": max(1, silence_ms // 2),
        # Without it a ping of a living call may stay unanswered for a minute.
        "grpc.http2.ping_timeout_ms": max(1, silence_ms // 2),
        "grpc.http2.max_pings_without_data": 0,
        "grpc.min_reconnect_backoff_ms": max(1, silence_ms),
        "grpc.max_reconnect_backoff_ms": max(1, silence_ms),
    }
    options = {**dict(_CLIENT_OPTIONS), **watch, "grpc.use_local_subchannel_pool": 1}
    return channels.open_channel(address, list(options.items()))


def is_ping_lost(error: grpc.aio.AioRpcError) -> bool:
    """Whether the connection was given up because a ping was not answered: nobody saw the other side end."""
    details = error.details() or ""
    return "ping timeout" in details or "keepalive watchdog timeout" in details
