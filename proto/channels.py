"""The one way to open a channel inside the cluster: where faults are possible, it is one that can have them."""

from __future__ import annotations

from collections.abc import Sequence

import grpc

from baton import faults
from baton.proto.faulty_channel import FaultyChannel

__all__ = ["open_channel"]


def open_channel(address: str, options: Sequence[tuple[str, int]] = ()) -> grpc.aio.Channel:
    """A plain-text channel to host:port.

    Args:
        options: of gRPC.
    """
    channel = grpc.aio.insecure_channel(address, options=options)
    if not faults.is_possible:
        return channel
    given = dict(options)
    ping_ms, answer_ms = given.get("grpc.keepalive_time_ms"), given.get("grpc.keepalive_timeout_ms", 20_000)
    return FaultyChannel(channel, address, None if ping_ms is None else (ping_ms + answer_ms) / 1000)
