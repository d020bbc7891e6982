"""Which transports failed with whom, so that the next link is made over another one. Pure.

A failure counts for a while only: a peer that was restarted with more shared memory gets its better transport back.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Sequence

__all__ = ["TransportFailures"]

_MAX_PEERS = 1024


class TransportFailures:
    """Remembers by peer and by name of the transport; bounded; thread-safe.

    Args:
        retry_s: after which a transport that failed is tried again.
    """

    def __init__(self, *, retry_s: float = 300.0) -> None:
        self._retry_s = retry_s
        self._lock = threading.Lock()
        self._failed: OrderedDict[str, dict[str, tuple[str, float]]] = OrderedDict()

    def note(self, peer: str, name: str, reason: str, now_s: float) -> bool:
        """A transport failed. True when that is news: no failure of it with this peer is remembered."""
        with self._lock:
            failed = self._failed.setdefault(peer, {})
            self._failed.move_to_end(peer)
            while len(self._failed) > _MAX_PEERS:
                self._failed.popitem(last=False)
            is_news = name not in failed
            failed[name] = (reason, now_s + self._retry_s)
            return is_news

    def usable(self, peer: str, names: Sequence[str], now_s: float) -> tuple[str, ...]:
        """Those of `names` that have not failed lately, in order; maybe none."""
        with self._lock:
            failed = dict(self._failed.get(peer, {}))
        return tuple(name for name in names if name not in failed or now_s >= failed[name][1])

    def reasons(self, peer: str) -> dict[str, str]:
        """Why they failed the last time, by name."""
        with self._lock:
            return {name: reason for name, (reason, _) in self._failed.get(peer, {}).items()}
