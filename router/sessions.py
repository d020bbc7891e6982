"""Where each session was served last: bounded, with a time to live, in this router and in the state that routers share.

    find       known here --> at once
               unknown    --> the shared state, for at most `_LOOK_S`; not asked while it is away
    remember   here at once; into the shared state a moment later, by one task, newest values only

It is a hint: a session that is not found is served where the other scorers would have it. A lost state costs no more.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
from collections import OrderedDict
from collections.abc import Mapping

from baton.clock import Clock, MonotonicClock
from baton.errors import UnavailableError
from baton.state.base import SharedState

__all__ = ["Sessions"]

_log = logging.getLogger(__name__)
_LOOK_S = 0.005
_WRITE_AGAIN_SHARE = 0.25
"""Of the time to live, after which what has not changed is written again."""
_MAX_UNWRITTEN = 10_000
_MAX_NAME_CHARS = 256
_ROLES = ("prefill", "decode")


class Sessions:
    """Session -> the instance of each role that served it.

    Args:
        shared: what routers share; None: each remembers its own.
        max_sessions: kept here, those used least recently dropped first.
    """

    def __init__(
        self,
        shared: SharedState | None = None,
        *,
        ttl_s: float = 1800.0,
        max_sessions: int = 100_000,
        clock: Clock | None = None,
    ) -> None:
        self._shared = shared
        self._ttl_s = ttl_s
        self._max_sessions = max_sessions
        self._clock = clock or MonotonicClock()
        self._known: OrderedDict[str, tuple[dict[str, str], float]] = OrderedDict()
        self._written: dict[str, tuple[dict[str, str], float]] = {}
        self._unwritten: OrderedDict[str, dict[str, str]] = OrderedDict()
        self._writer: asyncio.Task[None] | None = None

    def __len__(self) -> int:
        return len(self._known)

    async def find(self, tenant: str, session_id: str) -> Mapping[str, str]:
        """Instances by role; empty where nothing is known."""
        key, now_s = _key(tenant, session_id), self._clock.now_s()
        found, until_s = self._known.get(key, ({}, 0.0))
        if until_s > now_s or self._shared is None:
            return found if until_s > now_s else {}
        try:
            async with asyncio.timeout(_LOOK_S):
                value = await self._shared.get(key)
        except (TimeoutError, UnavailableError):
            return {}
        found = _parsed(value)
        if found:
            self._keep(key, found)
            self._written[key] = (found, now_s)
        return found

    def remember(self, tenant: str, session_id: str, instances: Mapping[str, str]) -> None:
        """The session is served by these; roles that are not named stay as they were."""
        key = _key(tenant, session_id)
        held, until_s = self._known.get(key, ({}, 0.0))
        now_s = self._clock.now_s()
        found = {**(held if until_s > now_s else {}), **{role: name for role, name in instances.items() if name}}
        self._keep(key, found)
        if self._shared is None:
            return
        written, at_s = self._written.get(key, ({}, 0.0))
        if written == found and now_s - at_s < self._ttl_s * _WRITE_AGAIN_SHARE:
            return
        self._unwritten[key] = found
        self._unwritten.move_to_end(key)
        while len(self._unwritten) > _MAX_UNWRITTEN:
            self._unwritten.popitem(last=False)
        if self._writer is None or self._writer.done():
            self._writer = asyncio.create_task(self._write(self._shared), name="sessions")

    async def close(self) -> None:
        """Stop writing; what is not written is lost."""
        if self._writer is not None:
            self._writer.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._writer

    def _keep(self, key: str, found: dict[str, str]) -> None:
        self._known[key] = (found, self._clock.now_s() + self._ttl_s)
        self._known.move_to_end(key)
        while len(self._known) > self._max_sessions:
            dropped, _ = self._known.popitem(last=False)
            self._written.pop(dropped, None)

    async def _write(self, shared: SharedState) -> None:
        while self._unwritten:
            key, found = self._unwritten.popitem(last=False)
            try:
                await shared.put(key, json.dumps(found).encode(), ttl_s=self._ttl_s)
            except UnavailableError as error:
                # They are served here all the same, and written when they are next used.
                _log.debug("sessions are not shared for now: %s", error.message)
                self._unwritten.clear()
                return
            if key in self._known:
                self._written[key] = (found, self._clock.now_s())


def _key(tenant: str, session_id: str) -> str:
    return "sessions/" + hashlib.sha256(json.dumps([tenant, session_id]).encode()).hexdigest()[:32]


def _parsed(value: bytes | None) -> dict[str, str]:
    """What another router wrote, so far as it is what a router writes."""
    if value is None or len(value) > 4 * _MAX_NAME_CHARS:
        return {}
    try:
        found = json.loads(value)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    names = {role: found.get(role) for role in _ROLES}
    return {role: name for role, name in names.items() if isinstance(name, str) and 0 < len(name) <= _MAX_NAME_CHARS}
