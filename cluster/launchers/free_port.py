"""A TCP port that stays ours: one that the system gives to nobody by itself."""

from __future__ import annotations

import random
import socket
from pathlib import Path

__all__ = ["choose_port"]

# Above what services and Ray's workers use by default.
_LOWEST = 20_000
_ATTEMPTS = 64


def choose_port(host: str) -> int:
    """A port that is free on `host` now and lies outside the range from which outgoing connections take theirs.

    Whoever listens there may die and listen there again later: no connection will have taken it meanwhile. Where that
    range leaves nothing else, any free one.
    """
    first, last = _outgoing_range()
    choices = [port for port in range(_LOWEST, 65_536) if not first <= port <= last]
    # Not seeded: two clusters that start at the same time shall not meet.
    for port in random.SystemRandom().sample(choices, min(_ATTEMPTS, len(choices))):
        if _bind(host, port):
            return port
    return _bind(host, 0)


def _outgoing_range() -> tuple[int, int]:
    try:
        first, last = Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()
    except OSError:
        # The range that IANA assigns.
        return 49_152, 65_535
    return int(first), int(last)


def _bind(host: str, port: int) -> int:
    """The port, once bound and given back; 0 where it is taken."""
    family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        try:
            probe.bind(address)
        except OSError:
            return 0
        return int(probe.getsockname()[1])
