"""gRPC settings between the ranks of an instance: a host that vanishes without a word is noticed within seconds."""

from __future__ import annotations

__all__ = ["CHANNEL_OPTIONS", "SERVER_OPTIONS"]

_PING_MS = 1_000
_PING_TIMEOUT_MS = 3_000

_PINGS = [
    ("grpc.keepalive_time_ms", _PING_MS),
    ("grpc.keepalive_timeout_ms", _PING_TIMEOUT_MS),
    # Without it gRPC gives an unanswered ping a minute.
    ("grpc.http2.ping_timeout_ms", _PING_TIMEOUT_MS),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
CHANNEL_OPTIONS = _PINGS
SERVER_OPTIONS = [*_PINGS, ("grpc.http2.min_ping_interval_without_data_ms", _PING_MS // 2)]
