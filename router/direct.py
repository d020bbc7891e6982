"""The short way of a plain token to its client: from the decode worker's message to the connection, in one call.

    link -> TokenQueue.put_token -> tap (counts, detokenises) -> DirectStream.write -> Connection.write -> socket

Everything else, the first and the last token too, takes the long way through deltas and ASGI messages, and both keep
their order: see `TokenQueue`. The chunk is not built anew for every token: `Answer.plain_chunk` gives what stands
before and behind the text. Where the server is not ours (`DirectProtocol`) or a client reads too slowly, the long way
serves.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Final

import orjson
from starlette.types import Scope
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from baton.router import limits
from baton.router.protocol.answers import Answer

__all__ = ["Connection", "DirectProtocol", "DirectStream"]

_EXTENSION: Final = "baton.connection"
_TOO_LARGE: Final = f"The head of a request may have {limits.MAX_HEADER_BYTES} bytes."


class Connection:
    """The body of one chunked response, past uvicorn: the framing of chunks has no state.

    Only for use while the response's own sender waits for something to send.
    """

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        # The cycle's scope holds this: without the collector, which would stop the loop, both go with their last user.
        self._cycle = weakref.ref(cycle)
        self._flow = cycle.flow
        self._write = cycle.transport.write

    @property
    def is_writable(self) -> bool:
        """Whether the client is there and keeps up."""
        cycle = self._cycle()
        return cycle is not None and not (self._flow.write_paused or cycle.disconnected)

    def write(self, data: bytes) -> None:
        """Sends `data`, not empty, as one chunk."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


class DirectProtocol(HttpToolsProtocol):
    """Uvicorn's HTTP/1.1 over httptools, with the `Connection` of each request in its scope.

    And what uvicorn leaves to others: what is read besides bodies is bounded, a client of HTTP/1.0 gets no chunks, and
    one that leaves is missed by every request that it sent, not by the last alone.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._frame_bytes = 0
        """Read since the last step of a message, bodies apart: a head or a trailer so far."""
        self._cycles: list[RequestResponseCycle] = []

    def data_received(self, data: bytes) -> None:
        """Called when something was read."""
        self._frame_bytes += len(data)
        super().data_received(data)
        if self._frame_bytes > limits.MAX_HEADER_BYTES and not self.transport.is_closing():
            self.send_400_response(_TOO_LARGE)

    def connection_lost(self, exc: Exception | None) -> None:
        """Called when the client is gone."""
        super().connection_lost(exc)
        for cycle in self._cycles:
            cycle.disconnected = cycle.disconnected or not cycle.response_complete
            cycle.message_event.set()

    def on_message_begin(self) -> None:
        """Called before a request's head."""
        self._frame_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """Called after a request's head."""
        if self._frame_bytes > limits.MAX_HEADER_BYTES:
            size = len(self.url) + sum(len(name) + len(value) for name, value in self.headers)
            if size > limits.MAX_HEADER_BYTES:
                raise ValueError(_TOO_LARGE)  # answered with 400
        super().on_headers_complete()
        self._frame_bytes = 0
        cycle = self.cycle
        self._cycles = [*(other for other in self._cycles if not other.response_complete), cycle]
        if cycle.scope["http_version"] == "1.1":
            extensions: dict[str, Any] = cycle.scope.setdefault("extensions", {})
            extensions[_EXTENSION] = Connection(cycle)
        else:
            cycle.send = _Unframed(cycle).send  # type: ignore[method-assign]

    def on_body(self, body: bytes) -> None:
        """Called for each piece of a body."""
        self._frame_bytes -= len(body)
        super().on_body(body)

    def on_chunk_header(self) -> None:
        """Called before each chunk of a body."""
        self._frame_bytes = 0


class _Unframed:
    """Sends to a client of HTTP/1.0: what has no length ends with the connection."""

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._send = cycle.send
        self._has_length = False

    async def send(self, message: Any) -> None:
        """One ASGI message."""
        if message["type"] == "http.response.start":
            self._has_length = any(name.lower() == b"content-length" for name, _ in message.get("headers", ()))
            if not self._has_length:
                self._cycle.chunked_encoding = False
        elif not self._has_length:
            self._cycle.expected_content_length = len(message.get("body", b""))
        await self._send(message)


class DirectStream:
    """Chunks of plain tokens for `answer`, whose response carries no length: chunked, then.

    Args:
        record: is told all that is written.

    Attributes:
        connection: set while the response is being sent.
    """

    __slots__ = ("_answer", "_parts", "_record", "_with_ids", "connection")

    def __init__(self, answer: Answer, record: Callable[[bytes], None] | None = None) -> None:
        self._answer = answer
        self._record = record
        self._parts: dict[bool, tuple[bytes, bytes, bytes]] = {}
        self._with_ids = answer.returns_token_ids
        self.connection: Connection | None = None

    def open(self, scope: Scope) -> None:
        """Write to the connection of `scope` from now on, where there is one."""
        self.connection = scope.get("extensions", {}).get(_EXTENSION)

    @property
    def is_open(self) -> bool:
        """Whether `write` may be called now."""
        connection = self.connection
        return connection is not None and connection.is_writable

    def write(self, text: str, token_id: int) -> None:
        """One chunk; none where there is nothing to tell."""
        assert self.connection is not None
        if not text and not self._with_ids:
            return
        parts = self._parts.get(text != "")
        if parts is None:
            parts = self._parts[text != ""] = self._answer.plain_chunk(has_text=text != "")
        head, middle, tail = parts
        shown = orjson.dumps(text) if text else b""
        data = b"%b%b%b%d%b" % (head, shown, middle, token_id, tail) if self._with_ids else head + shown + middle
        self.connection.write(data)
        if self._record is not None:
            self._record(data)
