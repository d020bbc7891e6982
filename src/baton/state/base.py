"""Shared state: small values under keys, each with a time to live, channels that carry what has just changed, and
streams of the last events.

    state = open_state(config.state)        "memory://" (this process alone) or "redis://host:6379/0"

Nothing here is a source of truth that could not be built again: instances announce themselves again, a request that is
not remembered is computed again. So every value has a time to live, every operation a deadline, and whoever uses this
says what happens while it is away. Values are bytes that the user serialised (protobuf or JSON, never pickle), and
whoever reads one checks it: others may have written it.

A reader of a stream keeps its own place: `end` says where the stream ends now, `read` waits for what comes behind.

A key is "group/name"; the group, all before the last slash, is what `scan` lists.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Protocol

__all__ = ["MAX_KEY_CHARS", "MAX_VALUE_BYTES", "SharedState", "check_value", "group_of"]

MAX_VALUE_BYTES = 4 << 20
"""Longer values are refused with a ValueError of the caller's making: state is for what is small."""
MAX_KEY_CHARS = 512


class SharedState(Protocol):
    """What every kind of shared state offers.

    All methods raise `UnavailableError`, within `timeout_s` of the state, where it does not answer; the error names it.
    """

    async def get(self, key: str) -> bytes | None:
        """The value, or None where there is none or its time is over."""
        ...

    async def put(self, key: str, value: bytes, *, ttl_s: float) -> None:
        """Set the value for `ttl_s` seconds, whatever was there."""
        ...

    async def put_new(self, key: str, value: bytes, *, ttl_s: float) -> bytes | None:
        """Set the value unless there is one, and return the one that is there; None says that this one was set."""
        ...

    async def replace(self, key: str, old: bytes, value: bytes, *, ttl_s: float) -> bool:
        """Set the value if `old` is there, in one step. False: something else is there, or nothing."""
        ...

    async def delete(self, key: str) -> None:
        """Drop the value, if there is one."""
        ...

    async def scan(self, group: str) -> dict[str, bytes]:
        """All values of a group, written with its last slash ("instances/"), by their whole key."""
        ...

    async def take_tokens(
        self, key: str, *, least: float, most: float, tokens_per_s: float, burst_tokens: float
    ) -> tuple[float, float]:
        """Tokens of a bucket, and how long to wait where none are given; see `rate_limits.py`."""
        ...

    async def return_tokens(self, key: str, tokens: float, *, burst_tokens: float) -> None:
        """Put back what was taken from a bucket and not used."""
        ...

    async def publish(self, channel: str, message: bytes) -> None:
        """Tell whoever listens to `channel` now; who does not listen misses it."""
        ...

    def listen(self, channel: str) -> AsyncIterator[bytes]:
        """What is published from now on. It ends with `UnavailableError`; then look at the values anew."""
        ...

    async def append(self, stream: str, event: bytes, *, max_events: int, ttl_s: float) -> None:
        """Add an event, and drop older ones than the last `max_events` or so; all are gone `ttl_s` after the last."""
        ...

    async def end(self, stream: str) -> str:
        """The place behind the last event."""
        ...

    async def read(self, stream: str, after: str, *, max_events: int, wait_s: float) -> tuple[str, list[bytes]]:
        """The next events behind a place, and the place behind them; none where nothing came for about `wait_s`.

        Who reads too slowly misses those that were dropped. After an `UnavailableError` begin at `end` again.
        """
        ...

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        ...


def group_of(key: str) -> str:
    """The group of a key, with its slash: "instances/" of "instances/decode-0"."""
    group, slash, _ = key.rpartition("/")
    assert group, f"the key {key!r} has no group"
    assert len(key) <= MAX_KEY_CHARS, f"a key of {len(key)} characters"
    return group + slash


def check_value(value: bytes) -> None:
    """Raises ValueError where `value` is too long to be kept."""
    if len(value) > MAX_VALUE_BYTES:
        raise ValueError(f"a value of {len(value)} bytes; shared state takes at most {MAX_VALUE_BYTES}")
