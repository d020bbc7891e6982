"""`open_state`: the shared state that `state:` of cluster.yaml names."""

from __future__ import annotations

from baton.state.base import SharedState
from baton.state.memory import MemoryState

__all__ = ["is_shared", "open_state"]

_MEMORY = "memory://"


def is_shared(url: str) -> bool:
    """Whether other processes see this state too."""
    return url != _MEMORY


def open_state(url: str, *, cluster: str = "baton") -> SharedState:
    """The state at `url`; connections are made when it is first used.

    Args:
        url: "memory://", or "redis://host:6379/0" ("rediss://" for TLS).
        cluster: parts the keys of clusters that share one Redis.

    Raises:
        ConfigError: no such kind of state, or the URL is wrong.
    """
    if not is_shared(url):
        return MemoryState()
    # Imported only where it is needed: the client is large.
    from baton.state.redis import RedisState

    return RedisState(url, cluster=cluster)
