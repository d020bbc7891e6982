"""An HTTP client that costs next to nothing: bodies encoded beforehand, one buffer scan per read, no parsing.

For streamed completions of a router on this machine only: an answer is a chunked response whose first event is the
first token, and which ends with the empty chunk.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

__all__ = ["Answered", "LeanClient"]

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Answered:
    """One answer.

    Attributes:
        sent_s, first_s, end_s: on the clock of `time.perf_counter`.
    """

    request_id: str
    sent_s: float
    first_s: float
    end_s: float


class _Connection(asyncio.Protocol):
    def __init__(self) -> None:
        self._first_s = 0.0
        self._tail = b""
        self._done: asyncio.Future[tuple[float, float]] | None = None
        self._transport: asyncio.WriteTransport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # uvloop's transports do not derive from asyncio's.
        self._transport = cast(asyncio.WriteTransport, transport)

    def connection_lost(self, exc: Exception | None) -> None:
        if self._done is not None and not self._done.done():
            self._done.set_exception(exc or ConnectionResetError("the router closed the connection"))

    def data_received(self, data: bytes) -> None:
        done = self._done
        if done is None or done.done():
            return
        now_s = time.perf_counter()
        if not self._first_s:
            if not self._tail and not data.startswith(b"HTTP/1.1 200"):
                done.set_exception(RuntimeError(data[:2000].decode(errors="replace")))
                return
            if b"data: " in data:
                self._first_s = now_s
        self._tail = (self._tail + data)[-5:]
        if self._tail == b"0\r\n\r\n":
            done.set_result((self._first_s, now_s))

    async def ask(self, pieces: Sequence[bytes]) -> tuple[float, float]:
        assert self._transport is not None
        self._first_s, self._tail = 0.0, b""
        self._done = asyncio.get_running_loop().create_future()
        self._transport.writelines(pieces)
        async with asyncio.timeout(_TIMEOUT_S):
            return await self._done

    def close(self) -> None:
        if self._transport is not None:
            self._transport.close()


class LeanClient:
    """Streamed completions from `url`, over connections that are kept.

    Args:
        body_of: the JSON body of request number n.
        name: begins the request ids.
    """

    def __init__(self, url: str, body_of: Callable[[int], bytes], name: str) -> None:
        self._host, _, port = url.removeprefix("http://").rpartition(":")
        self._port = int(port)
        self._body_of = body_of
        self._name = name
        self._num_sent = 0
        self._idle: list[_Connection] = []

    async def connect(self, count: int) -> None:
        """Open connections beforehand."""
        opened = [await self._take() for _ in range(count)]
        self._idle += opened

    async def at_rate(self, rate: float, gaps_s: Sequence[float]) -> list[Answered]:
        """An open loop: one request after each of `gaps_s` divided by `rate`, whatever the answers take."""
        due_s = time.perf_counter()
        tasks = []
        for gap_s in gaps_s:
            due_s += gap_s / rate
            await asyncio.sleep(max(due_s - time.perf_counter(), 0.0))
            tasks.append(asyncio.create_task(self._one()))
        return list(await asyncio.gather(*tasks))

    async def closed_loop(self, concurrency: int, seconds: float) -> list[Answered]:
        """`concurrency` requests at any time, for `seconds`."""
        answers: list[Answered] = []
        end_s = time.perf_counter() + seconds

        async def one_after_another() -> None:
            while time.perf_counter() < end_s:
                answers.append(await self._one())

        await asyncio.gather(*(one_after_another() for _ in range(concurrency)))
        return answers

    def close(self) -> None:
        """Close every idle connection."""
        for connection in self._idle:
            connection.close()

    async def _take(self) -> _Connection:
        if self._idle:
            return self._idle.pop()
        loop = asyncio.get_running_loop()
        _, connection = await loop.create_connection(_Connection, self._host, self._port)
        return connection

    async def _one(self) -> Answered:
        connection = await self._take()
        number = self._num_sent
        self._num_sent += 1
        request_id, body = f"{self._name}{number}", self._body_of(number)
        head = (
            f"POST /v1/completions HTTP/1.1\r\nHost: {self._host}\r\nContent-Type: application/json\r\n"
            f"X-Request-Id: {request_id}\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        sent_s = time.perf_counter()
        first_s, end_s = await connection.ask((head.encode(), body))
        self._idle.append(connection)
        return Answered(request_id, sent_s, first_s, end_s)
