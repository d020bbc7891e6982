"""The short way of a plain token to its client: from the decode worker's message to the connection, in one call.

    link -> TokenQueue.put_token -> tap (counts, detokenises) -> DirectStream.write -> Connection.write -> socket

Everything else, the first and the last token too, takes the long way through deltas and ASGI messages, and both keep
their order: see `TokenQueue`. The chunk is not built anew for every token: `Answer.plain_chunk` gives what stands
before and behind the text. Where the server is not ours (`DirectProtocol`) or a client reads too slowly, the long way
serves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

import orjson
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from baton.router.protocol.answers import Answer

__all__ = ["Connection", "DirectProtocol", "DirectStream"]

_EXTENSION: Final = "baton.connection"


class Connection:
    """The body of one chunked response, past h11: its framing of chunks has no state.

    Only for use while the response's own sender waits for something to send.
    """

    __slots__ = ("_cycle", "_flow", "_write")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._flow = cycle.flow
        self._write = cycle.transport.write

    @property
    def is_writable(self) -> bool:
        """Whether the client is there and keeps up."""
        return not (self._flow.write_paused or self._cycle.disconnected)

    def write(self, data: bytes) -> None:
        """Sends `data`, not empty, as one chunk."""
        self._write(b"%x\r\n%b\r\n" % (len(data), data))


class DirectProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, with the `Connection` of each request in its scope."""

    def handle_events(self) -> None:
        """Called when something was read."""
        super().handle_events()
        if self.cycle is not None and self.cycle.scope["http_version"] == "1.1":
            extensions: dict[str, Any] = self.cycle.scope.setdefault("extensions", {})
            extensions.setdefault(_EXTENSION, Connection(self.cycle))


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
