"""Clients of the load: each streams one request after another over HTTP and holds its tokens against those that came
before any fault.

A request whose connection breaks (its router died) is sent again through another router, with the same
`Idempotency-Key`, also when it is told at first that the dead router still works on it (409); one that is refused for
now (429, 503) is sent again after a moment. Both are counted. It has failed
when the server says so, when a stream says nothing for `SILENCE_S`, or when it has not come to its end in `GIVE_UP_S`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx

from baton.cluster.chaos.prompts import NUM_PROMPTS, body_of, salted
from baton.cluster.chaos.report import Outcome
from baton.errors import BatonError, DeadlineError, UnavailableError

__all__ = ["GIVE_UP_S", "SILENCE_S", "Load"]

SILENCE_S = 100.0
GIVE_UP_S = 150.0
_REFUSED = (429, 503)
_IN_WORK = 409
_REFUSED_PAUSE_S = 0.2
_RECONNECT_PAUSE_S = 0.1
_EXPECTED_AT_ONCE = 4
_NO_BREAK = "the stream ended before its end"


class _RefusedError(Exception):
    """Not now."""


class _BrokenError(Exception):
    """The connection is gone."""


@dataclass(slots=True)
class _Try:
    """What one sending of a request brought, and what all sendings before it had."""

    began_s: float
    best: int = 0
    last_s: float = 0.0
    longest_wait_s: float = 0.0
    waited_at_s: float = 0.0
    ids: list[int] = field(default_factory=list)
    usage: dict[str, Any] = field(default_factory=dict)
    done: bool = False
    reconnects: int = 0
    refusals: int = 0

    def take(self, ids: Sequence[int], now_s: float) -> None:
        """Tokens that came; what a former try had brought already ends no wait."""
        self.ids += ids
        if len(self.ids) > self.best:
            self.best = len(self.ids)
            if now_s - self.last_s > self.longest_wait_s:
                self.longest_wait_s, self.waited_at_s = now_s - self.last_s, self.last_s
            self.last_s = now_s


class Load:
    """Sends requests and keeps their outcomes.

    Args:
        urls: base URLs of the routers that are there now, without /v1.
        model: its name.
        max_tokens: of every answer.
    """

    def __init__(
        self, urls: Callable[[], Sequence[str]], *, model: str, api_key: str | None = None, max_tokens: int = 96
    ) -> None:
        self._urls = urls
        self._model = model
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._max_tokens = max_tokens
        self._expected: list[list[int]] = []
        self._client: httpx.AsyncClient | None = None
        self._zero_s = time.monotonic()
        self._sent = 0
        self.outcomes: list[Outcome] = []
        self.undisturbed_wait_s = 0.0
        self.running = 0
        self.held_back = 0

    async def __aenter__(self) -> Load:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=64)
        timeout = httpx.Timeout(SILENCE_S, connect=5.0)
        self._client = httpx.AsyncClient(timeout=timeout, limits=limits, trust_env=False, headers=self._headers)
        return self

    async def __aexit__(self, *error: object) -> None:
        assert self._client is not None
        await self._client.aclose()

    def now_s(self) -> float:
        """Since `begin`."""
        return time.monotonic() - self._zero_s

    def body(self, number: int) -> dict[str, Any]:
        """The request of that number."""
        return body_of(number % NUM_PROMPTS, model=self._model, max_tokens=self._max_tokens)

    async def expect(self) -> None:
        """Ask once for everything, with nobody disturbed; what comes now must come always.

        Raises:
            BatonError: a request failed with no fault about.
        """
        gate = asyncio.Semaphore(_EXPECTED_AT_ONCE)

        async def one(number: int) -> list[int]:
            async with gate:
                seen = _Try(self.now_s(), last_s=self.now_s())
                try:
                    await self._send(seen, self.body(number), "", self._urls()[0])
                except (_RefusedError, _BrokenError, httpx.HTTPError) as error:
                    raise UnavailableError(f"before any fault, a request failed: {error}") from error
                self.undisturbed_wait_s = max(self.undisturbed_wait_s, seen.longest_wait_s)
                return seen.ids

        try:
            async with asyncio.TaskGroup() as tasks:
                answers = [tasks.create_task(one(number)) for number in range(NUM_PROMPTS)]
        except* BatonError as errors:
            raise errors.exceptions[0] from None
        self._expected = [answer.result() for answer in answers]

    def begin(self) -> None:
        """Times count from now."""
        self._zero_s = time.monotonic()

    async def client(self, first: int, stop: asyncio.Event, requests: int | None = None) -> None:
        """One request after another until `stop`, or `requests` of them; a request under way comes to its end."""
        number = first
        while not stop.is_set() and (requests is None or number - first < requests):
            await self.ask(number * 7 + first)
            number += 1

    async def arrivals(self, rate_per_s: float, stop: asyncio.Event, *, seed: int, at_once: int) -> None:
        """Requests that come by themselves, `rate_per_s` in the mean (Poisson), until `stop`; all come to their end.

        One that would be more than `at_once` under way does not come, and is counted in `held_back`.
        """
        draw = random.Random(seed)
        next_s = self.now_s()
        async with asyncio.TaskGroup() as tasks:
            while not stop.is_set():
                next_s += draw.expovariate(rate_per_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(max(0.0, next_s - self.now_s())):
                        await stop.wait()
                        return
                if self.running >= at_once:
                    self.held_back += 1
                else:
                    tasks.create_task(self.ask(draw.randrange(NUM_PROMPTS)))

    async def ask(self, number: int) -> Outcome:
        """One request, to its end whatever that is."""
        number %= NUM_PROMPTS
        body = self.body(number)
        self._sent += 1
        if self._sent % 2:
            body = salted(body, f"chaos-{self._sent}")
        began_s = self.now_s()
        seen = _Try(began_s, last_s=began_s)
        self.running += 1
        try:
            error = await self._see_through(seen, body)
        finally:
            self.running -= 1
        is_wrong = not error and not self._is_right(number, seen)
        outcome = Outcome(
            number=number,
            began_s=began_s,
            ended_s=self.now_s(),
            tokens=len(seen.ids),
            longest_wait_s=seen.longest_wait_s,
            waited_at_s=seen.waited_at_s,
            is_wrong=is_wrong,
            error=error,
            reconnects=seen.reconnects,
            refusals=seen.refusals,
        )
        self.outcomes.append(outcome)
        return outcome

    def _is_right(self, number: int, seen: _Try) -> bool:
        return seen.ids == self._expected[number] and seen.usage.get("completion_tokens") == len(seen.ids)

    async def _see_through(self, seen: _Try, body: dict[str, Any]) -> str:
        """Why the request failed; empty when it has come to its end."""
        key = secrets.token_hex(16)
        turn = self._sent
        why = "no router is listed"
        while self.now_s() - seen.began_s < GIVE_UP_S:
            urls = self._urls()
            if urls:
                seen.ids, seen.usage, seen.done = [], {}, False
                try:
                    await self._send(seen, body, key, urls[turn % len(urls)])
                    return ""
                except _RefusedError as error:
                    why = str(error)
                    seen.refusals += 1
                    await asyncio.sleep(_REFUSED_PAUSE_S)
                except (_BrokenError, httpx.NetworkError, httpx.RemoteProtocolError, httpx.ConnectTimeout) as error:
                    why = str(error) or type(error).__name__
                    seen.reconnects += 1
                except httpx.ReadTimeout:
                    return f"the stream said nothing for {SILENCE_S:.0f} s"
                except (BatonError, httpx.HTTPError) as error:
                    return str(error) or type(error).__name__
            turn += 1
            await asyncio.sleep(_RECONNECT_PAUSE_S)
        return f"not served within {GIVE_UP_S:.0f} s: {why}"

    async def _send(self, seen: _Try, body: dict[str, Any], key: str, url: str) -> None:
        assert self._client is not None
        headers = {"Idempotency-Key": key} if key else {}
        async with self._client.stream("POST", f"{url}/v1/completions", json=body, headers=headers) as response:
            if response.status_code != 200:
                await response.aread()
                text = f"status {response.status_code}: {_message(response)}"
                if response.status_code == _IN_WORK and seen.reconnects:
                    raise _BrokenError(text)
                if response.status_code in _REFUSED:
                    raise _RefusedError(text)
                raise BatonError(text)
            async for line in response.aiter_lines():
                self._take(line, seen)
                if self.now_s() - seen.began_s > GIVE_UP_S:
                    raise DeadlineError(f"not at its end after {GIVE_UP_S:.0f} s and {len(seen.ids)} tokens")
        if not seen.done:
            raise _BrokenError(_NO_BREAK)

    def _take(self, line: str, seen: _Try) -> None:
        if line == "data: [DONE]":
            seen.done = True
        elif line.startswith("data: {"):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise BatonError(f"error in the stream: {chunk['error'].get('message', chunk['error'])}")
            seen.usage = chunk.get("usage") or seen.usage
            ids = [token_id for choice in chunk["choices"] for token_id in choice.get("token_ids") or ()]
            if ids:
                seen.take(ids, self.now_s())


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return response.text[:200]
