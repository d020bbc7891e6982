"""Which transport a link uses: the sender lists what it has in order of preference, the receiver picks.

`auto` prefers shared memory where both peers see the same `/dev/shm`, and Gloo otherwise. A transport that cannot be
set up is skipped with a warning, and the next one is tried.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from baton.errors import ConfigError
from baton.kv_transfer.transports.base import DEFAULT_ARENA_BYTES, Transport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.shm import ShmTransport

__all__ = ["TRANSPORT_NAMES", "candidates", "host_id", "make_transports"]

TRANSPORT_NAMES = ("shm", "gloo")
_SAME_HOST_ONLY = frozenset({"shm"})


def make_transports(
    choice: str = "auto",
    *,
    host: str = "127.0.0.1",
    arena_bytes: int = DEFAULT_ARENA_BYTES,
    rate_limit_gbit_s: float | None = None,
) -> tuple[Transport, ...]:
    """The transports of a worker, best first, by `transfer.transport` of the configuration.

    Args:
        choice: "auto", or the name of the only one to use.
        host: this host's address as peers reach it.
        arena_bytes: staging memory per link on the sender.
        rate_limit_gbit_s: what gloo receives at most, all links together; None for no limit.

    Raises:
        ConfigError: unknown name.
    """
    if choice != "auto" and choice not in TRANSPORT_NAMES:
        raise ConfigError(f"transfer.transport is {choice!r}; it must be one of auto, {', '.join(TRANSPORT_NAMES)}")
    made: list[Transport] = []
    if choice in ("auto", "shm"):
        made.append(ShmTransport(arena_bytes=arena_bytes))
    if choice in ("auto", "gloo"):
        limit = None if rate_limit_gbit_s is None else rate_limit_gbit_s * 1e9 / 8
        made.append(GlooTransport(host=host, arena_bytes=arena_bytes, rate_limit_bytes_s=limit))
    return tuple(made)


def candidates(
    offered: Sequence[str], available: Sequence[str], *, sender_host_id: str, receiver_host_id: str
) -> tuple[str, ...]:
    """Names that both sides have and that their hosts allow, in the sender's order."""
    same_host = bool(sender_host_id) and sender_host_id == receiver_host_id
    return tuple(name for name in offered if name in available and (same_host or name not in _SAME_HOST_ONLY))


def host_id() -> str:
    """Equal for two processes that share a kernel and its `/dev/shm`, hence not for two containers without it."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(f"{boot_id}/{os.stat('/dev/shm').st_dev}/{os.getuid()}".encode()).hexdigest()[:16]
