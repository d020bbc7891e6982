"""Shared state in Redis, for several routers: every operation ends in time, whatever Redis does.

    there --an operation fails or takes longer than `timeout_s`--> away: every operation fails at once
    away  --a PING, sent every `probe_s`, is answered--> there

Keys are "baton:{<cluster>}:<key>" (the braces keep a cluster's keys in one slot of a Redis cluster), the index of a
group is "baton:{<cluster>}:index:<group>", a stream "baton:{<cluster>}:stream:<name>"; see `scripts.py`. What others
may have put there is bounded before it is read: values of another type or longer than `MAX_VALUE_BYTES`, and more than
`_MAX_SCAN_BYTES` or `_MAX_SCAN_KEYS` in one group, are left out with one warning each.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from typing import Any

import redis.asyncio as client
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import ConnectionError as LostError
from redis.exceptions import RedisError, ResponseError

from baton.config_values import without_password
from baton.errors import ConfigError, UnavailableError
from baton.state import rate_limits, scripts
from baton.state.base import MAX_VALUE_BYTES, check_value, group_of

__all__ = ["RedisState"]

_log = logging.getLogger(__name__)

_TIMEOUT_S = 0.5
_PROBE_S = 0.5
# A listener that heard nothing for so long asks whether Redis is still there.
_QUIET_S = 1.0
_MAX_CONNECTIONS = 16
_MAX_SCAN_BYTES = 16 << 20
_MAX_SCAN_KEYS = 4096
_MAX_WARNED = 256
# A server that is no Redis makes the client raise ValueError.
_FAILURES = (RedisError, OSError, TimeoutError, ValueError)


class RedisState:
    """Implements `SharedState`.

    Args:
        url: redis://[user:password@]host:port/db, rediss:// for TLS.
        cluster: whose keys.
        timeout_s: longest time of any operation.
        probe_s: pause between looks at a Redis that is away.

    Raises:
        ConfigError: the URL is wrong.
    """

    def __init__(self, url: str, *, cluster: str, timeout_s: float = _TIMEOUT_S, probe_s: float = _PROBE_S) -> None:
        self.name = without_password(url)
        self._prefix = f"baton:{{{cluster}}}:"
        self._timeout_s = timeout_s
        self._probe_s = probe_s
        try:
            pool = client.BlockingConnectionPool.from_url(
                url,
                max_connections=_MAX_CONNECTIONS,
                timeout=timeout_s,
                socket_timeout=timeout_s,
                socket_connect_timeout=timeout_s,
                retry=Retry(NoBackoff(), 0),
                protocol=2,
                client_name="baton",
            )
        except (ValueError, TypeError) as error:
            raise ConfigError(f"state: {self.name} is not a URL of a Redis: {error}") from error
        self._redis: Any = client.Redis(connection_pool=pool)
        self._away = ""
        self._probe: asyncio.Task[None] | None = None
        self._warned: set[str] = set()
        self._closed = False

    async def get(self, key: str) -> bytes | None:
        """The value, or None where there is none, its time is over, or it is not one of ours."""
        found = await self._run(scripts.GET, key, MAX_VALUE_BYTES)
        if isinstance(found, list):
            self._warn(key, f"{key} holds a {found[0].decode(errors='replace')} of {found[1]} bytes; ignored")
            return None
        return _bytes_or_none(found)

    async def put(self, key: str, value: bytes, *, ttl_s: float) -> None:
        """Set the value for `ttl_s` seconds, whatever was there."""
        check_value(value)
        await self._run(scripts.PUT, key, value, _milliseconds(ttl_s))

    async def put_new(self, key: str, value: bytes, *, ttl_s: float) -> bytes | None:
        """Set the value unless there is one, and return the one that is there."""
        check_value(value)
        return _bytes_or_none(await self._run(scripts.PUT_NEW, key, value, _milliseconds(ttl_s), MAX_VALUE_BYTES))

    async def replace(self, key: str, old: bytes, value: bytes, *, ttl_s: float) -> bool:
        """Set the value if `old` is there."""
        check_value(value)
        return bool(await self._run(scripts.REPLACE, key, value, _milliseconds(ttl_s), MAX_VALUE_BYTES, old))

    async def delete(self, key: str) -> None:
        """Drop the value, if there is one."""
        await self._run(scripts.DELETE, key)

    async def scan(self, group: str) -> dict[str, bytes]:
        """All values of a group, by their whole key."""
        begin = f"{self._prefix}{group}"
        found = await self._do(
            "EVAL", scripts.SCAN, 1, self._index(group), begin, MAX_VALUE_BYTES, _MAX_SCAN_BYTES, _MAX_SCAN_KEYS
        )
        if found[0]:
            self._warn(group, f"{found[0]} values of {group} are foreign, too long or too many; ignored")
        pairs = zip(found[1::2], found[2::2], strict=True)
        return {key.decode(errors="replace").removeprefix(self._prefix): value for key, value in pairs}

    async def take_tokens(
        self, key: str, *, least: float, most: float, tokens_per_s: float, burst_tokens: float
    ) -> tuple[float, float]:
        """Tokens of a bucket, and how long to wait where none are given."""
        group_of(key)
        arguments = (least, most, tokens_per_s, burst_tokens)
        granted, wait_s = await self._do("EVAL", rate_limits.TAKE, 1, self._prefix + key, *arguments)
        return float(granted), float(wait_s)

    async def return_tokens(self, key: str, tokens: float, *, burst_tokens: float) -> None:
        """Put back what was taken from a bucket and not used."""
        await self._do("EVAL", rate_limits.RETURN, 1, self._prefix + key, tokens, burst_tokens)

    async def publish(self, channel: str, message: bytes) -> None:
        """Tell whoever listens to `channel` now."""
        check_value(message)
        await self._do("PUBLISH", self._prefix + channel, message)

    async def listen(self, channel: str) -> AsyncIterator[bytes]:
        """What is published from now on, until Redis is away."""
        self._check_there()
        pubsub = self._redis.pubsub()
        try:
            with self._noticing():
                async with asyncio.timeout(self._timeout_s):
                    await pubsub.subscribe(self._prefix + channel)
            has_asked = False
            while True:
                with self._noticing():
                    message = await self._next_message(pubsub)
                    if message is None and has_asked:
                        raise TimeoutError(f"no answer to a PING within {_QUIET_S:g} s")
                    has_asked = message is None
                    if has_asked:
                        async with asyncio.timeout(self._timeout_s):
                            await pubsub.ping()
                if message is not None and message["type"] == "message" and len(message["data"]) <= MAX_VALUE_BYTES:
                    yield message["data"]
        finally:
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(self._timeout_s):
                    await pubsub.aclose()

    async def append(self, stream: str, event: bytes, *, max_events: int, ttl_s: float) -> None:
        """Add an event, and drop older ones than the last `max_events` or so."""
        check_value(event)
        await self._do("EVAL", scripts.APPEND, 1, self._stream(stream), event, max_events, _milliseconds(ttl_s))

    async def end(self, stream: str) -> str:
        """The place behind the last event."""
        last = await self._do("XREVRANGE", self._stream(stream), "+", "-", "COUNT", 1)
        return _place(last[0][0]) if last else "0-0"

    async def read(self, stream: str, after: str, *, max_events: int, wait_s: float) -> tuple[str, list[bytes]]:
        """The next events behind a place, and the place behind them; it waits for half of `timeout_s` at most."""
        wait_ms = _milliseconds(min(wait_s, self._timeout_s / 2))
        command = ("XREAD", "COUNT", max_events, "BLOCK", wait_ms, "STREAMS", self._stream(stream), after)
        found = await self._do(*command)
        entries = found[0][1] if found else []
        events = [fields.get(b"event") for _, fields in entries]
        place = _place(entries[-1][0]) if entries else after
        return place, [event for event in events if event is not None and len(event) <= MAX_VALUE_BYTES]

    async def close(self) -> None:
        """Let go of connections. Idempotent."""
        self._closed, self._away = True, self._away or "closed"
        if self._probe is not None:
            self._probe.cancel()
            await asyncio.gather(self._probe, return_exceptions=True)
            self._probe = None
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(self._timeout_s):
                await self._redis.connection_pool.disconnect()

    async def _run(self, script: str, key: str, *arguments: Any) -> Any:
        return await self._do("EVAL", script, 2, self._prefix + key, self._index(group_of(key)), *arguments)

    async def _do(self, *command: Any) -> Any:
        self._check_there()
        with self._noticing():
            async with asyncio.timeout(self._timeout_s):
                return await self._redis.execute_command(*command)

    async def _next_message(self, pubsub: Any) -> dict[str, Any] | None:
        async with asyncio.timeout(_QUIET_S + self._timeout_s):
            message: dict[str, Any] | None = await pubsub.get_message(timeout=_QUIET_S)
            return message

    def _index(self, group: str) -> str:
        return f"{self._prefix}index:{group}"

    def _stream(self, name: str) -> str:
        return f"{self._prefix}stream:{name}"

    def _check_there(self) -> None:
        if self._away:
            raise UnavailableError(f"the shared state {self.name} is away ({self._away})")

    @contextlib.contextmanager
    def _noticing(self) -> Any:
        """Failures as `UnavailableError`; those that say that Redis is not there are noted."""
        try:
            yield
        except ResponseError as error:
            raise UnavailableError(f"the shared state {self.name} refuses: {error}") from error
        except _FAILURES as error:
            why = _reason(error, self._timeout_s)
            self._lost(why)
            raise UnavailableError(f"the shared state {self.name} does not answer ({why})") from error

    def _lost(self, why: str) -> None:
        if self._away or self._closed:
            return
        self._away = why
        _log.warning("the shared state %s does not answer (%s); going on without it", self.name, why)
        self._probe = asyncio.get_running_loop().create_task(self._probe_until_back(), name="redis probe")

    async def _probe_until_back(self) -> None:
        # What is left of connections to a Redis that died is of no use to its successor.
        with contextlib.suppress(*_FAILURES):
            async with asyncio.timeout(self._timeout_s):
                await self._redis.connection_pool.disconnect(inuse_connections=False)
        while True:
            await asyncio.sleep(self._probe_s)
            with contextlib.suppress(*_FAILURES):
                async with asyncio.timeout(self._timeout_s):
                    await self._redis.execute_command("PING")
                break
        _log.info("the shared state %s answers again", self.name)
        self._away, self._probe = "", None

    def _warn(self, what: str, text: str) -> None:
        if what not in self._warned and len(self._warned) < _MAX_WARNED:
            self._warned.add(what)
            _log.warning("shared state %s: %s", self.name, text)


def _milliseconds(ttl_s: float) -> int:
    return max(1, round(ttl_s * 1000))


def _place(entry_id: bytes | str) -> str:
    return entry_id if isinstance(entry_id, str) else entry_id.decode()


def _bytes_or_none(found: Any) -> bytes | None:
    assert found is None or isinstance(found, bytes), type(found)
    return found


def _reason(error: BaseException, timeout_s: float) -> str:
    if isinstance(error, TimeoutError):
        return f"nothing within {timeout_s:g} s"
    text = str(error) or type(error).__name__
    return text.partition("\n")[0][:200] if isinstance(error, LostError) else f"{type(error).__name__}: {text[:200]}"
