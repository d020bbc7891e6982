"""HTTP/1.1 connections of the load generator, made for little work per byte: a pool, and what one carries.

    Exchange           one request's response: status, headers that matter, and the body as it comes
    HttpConnections    keeps idle connections for the next request; `request(...)` runs one exchange

General HTTP clients cost several times the work of a small answer; this one adds about a tenth of a millisecond to a
request and a few microseconds to a chunk, so that one process can offer a thousand requests a second.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import httptools

__all__ = ["Exchange", "HttpConnections"]

# Servers commonly close what was idle for 5 s; one that closes as we write would look like a failure.
_MAX_IDLE_S = 2.0
_CONNECT_TIMEOUT_S = 10.0


class Exchange:
    """One response.

    Args:
        on_body: takes bytes of the body and when they came; what it raises ends the exchange.
    """

    __slots__ = ("done", "has_begun", "headers", "on_body", "status")

    def __init__(self, on_body: Callable[[Exchange, bytes, float], None], done: asyncio.Future[None]) -> None:
        self.on_body = on_body
        self.done = done
        self.status = 0
        self.headers: dict[bytes, bytes] = {}
        self.has_begun = False


class _Connection(asyncio.Protocol):
    """One connection; carries one exchange at a time. httptools calls the `on_` methods."""

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self._exchange: Exchange | None = None
        self._now_s = 0.0
        self._transport: Any = None
        self.is_usable = True
        self.idle_since_s = 0.0

    def start(self, exchange: Exchange, message: bytes) -> None:
        """Send a request whose response goes to `exchange`."""
        self._exchange = exchange
        self._transport.write(message)

    def abort(self) -> None:
        """Close at once."""
        self.is_usable = False
        self._exchange = None
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._now_s = time.monotonic()
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            # What a callback raised is its context.
            cause = error.__context__ or error
            self._fail(cause if isinstance(cause, Exception) else error)
            self._transport.abort()

    def connection_lost(self, error: Exception | None) -> None:
        self.is_usable = False
        exchange = self._exchange
        if exchange is not None and exchange.status and not self._is_framed(exchange) and error is None:
            # A body without a length ends with the connection.
            self._finish()
        self._fail(error if isinstance(error, OSError) else ConnectionError("the server closed the connection"))

    def on_message_begin(self) -> None:
        if self._exchange is not None:
            self._exchange.has_begun = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._exchange is not None:
            self._exchange.headers[name.lower()] = value

    def on_headers_complete(self) -> None:
        if self._exchange is not None:
            self._exchange.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        if self._exchange is not None:
            self._exchange.on_body(self._exchange, body, self._now_s)

    def on_message_complete(self) -> None:
        self.is_usable = self.is_usable and self._parser.should_keep_alive()
        self._finish()

    def _is_framed(self, exchange: Exchange) -> bool:
        return b"content-length" in exchange.headers or b"transfer-encoding" in exchange.headers

    def _finish(self) -> None:
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.done.done():
            exchange.done.set_result(None)

    def _fail(self, error: Exception) -> None:
        self.is_usable = False
        exchange, self._exchange = self._exchange, None
        if exchange is not None and not exchange.done.done():
            exchange.done.set_exception(error)


class HttpConnections:
    """Connections to one server, as many as there are requests at once.

    Args:
        url: http or https; its path is put before that of every request.
        headers: sent with every request.
    """

    def __init__(self, url: str, headers: dict[str, str]) -> None:
        parts = urlsplit(url)
        assert parts.hostname, "checked where the option was read"
        self._host = parts.hostname
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._port = parts.port or (443 if self._tls else 80)
        self._prefix = parts.path.rstrip("/")
        self._head = f"Host: {parts.netloc.rpartition('@')[2]}\r\n".encode()
        self._head += b"".join(f"{name}: {value}\r\n".encode("latin-1") for name, value in headers.items())
        self._idle: list[_Connection] = []
        self._busy: set[_Connection] = set()

    def message(self, path: str, body: bytes, head: bytes = b"") -> bytes:
        """The bytes of a POST of JSON; `head` holds whole header lines more."""
        return b"".join(
            (
                f"POST {self._prefix}{path} HTTP/1.1\r\n".encode(),
                self._head,
                head,
                b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body),
                body,
            )
        )

    async def request(self, message: bytes, on_body: Callable[[Exchange, bytes, float], None]) -> Exchange:
        """Send and wait for the whole response.

        Raises:
            OSError: no connection within 10 s, or a broken one.
            Exception: what `on_body` raised.
        """
        while True:
            connection, is_fresh = await self._take()
            exchange = Exchange(on_body, asyncio.get_running_loop().create_future())
            self._busy.add(connection)
            try:
                connection.start(exchange, message)
                await exchange.done
            except OSError:
                # A kept connection may have been closed as it was taken; then nothing came, and a fresh one is tried.
                if is_fresh or exchange.has_begun:
                    raise
                continue
            except asyncio.CancelledError:
                connection.abort()
                raise
            finally:
                self._busy.discard(connection)
                if connection.is_usable:
                    connection.idle_since_s = time.monotonic()
                    self._idle.append(connection)
                else:
                    connection.abort()
            return exchange

    async def _take(self) -> tuple[_Connection, bool]:
        oldest_s = time.monotonic() - _MAX_IDLE_S
        while self._idle:
            connection = self._idle.pop()
            if connection.is_usable and connection.idle_since_s >= oldest_s:
                return connection, False
            connection.abort()
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                _, made = await asyncio.get_running_loop().create_connection(
                    _Connection, self._host, self._port, ssl=self._tls
                )
        except TimeoutError:
            raise ConnectionError(
                f"{self._host}:{self._port} took no connection in {_CONNECT_TIMEOUT_S:.0f} s"
            ) from None
        return made, True

    async def close(self) -> None:
        """Drop all connections."""
        for connection in (*self._idle, *self._busy):
            connection.abort()
        self._idle.clear()
