"""The short way of a plain token to its client: from the decode worker's message to the connection, in one call.

    link -> TokenQueue.put_token -> tap (counts, detokenises) -> DirectStream.write -> Connection.write -> socket

Everything else, the first and the last token too, takes the long way through deltas and ASGI messages, and both keep
their order: see `TokenQueue`. The chunk is not built anew for every token: `Answer.plain_chunk` gives what stands
before and behind the text. Where the server is not ours (`DirectProtocol`) or a client reads too slowly, the long way
serves.
"""

from __future__ import annotations

from typing import Any, Final

import orjson
from starlette.types import Scope
from uvicorn.protocols.http.h11_impl import H11Protocol, RequestResponseCycle

from baton.router.protocol.answers import Answer

__all__ = ["Connection", "DirectProtocol", "DirectStream"]

_EXTENSION: Final = "baton.connection"


class Connection:
    """The body of one response, past h11: its framing of chunks has no state."""

    __slots__ = ("_cycle", "_frames_chunks")

    def __init__(self, cycle: RequestResponseCycle) -> None:
        self._cycle = cycle
        self._frames_chunks = cycle.scope["http_version"] == "1.1" and cycle.scope["method"] != "HEAD"

    @property
    def is_writable(self) -> bool:
        """Whether the body has begun, its end has not come, and the client keeps up."""
        cycle = self._cycle
        return (
            self._frames_chunks
            and cycle.response_started
            and not cycle.response_complete
            and not cycle.disconnected
            and not cycle.flow.write_paused
        )

    def write(self, data: bytes) -> None:
        """Sends `data`, not empty, as one chunk."""
        self._cycle.transport.write(b"%x\r\n%b\r\n" % (len(data), data))


class DirectProtocol(H11Protocol):
    """Uvicorn's HTTP/1.1, with the `Connection` of each request in its scope."""

    def handle_events(self) -> None:
        """Called when something was read."""
        super().handle_events()
        if self.cycle is not None:
            extensions: dict[str, Any] = self.cycle.scope.setdefault("extensions", {})  # type: ignore[assignment,arg-type]
            extensions.setdefault(_EXTENSION, Connection(self.cycle))


class DirectStream:
    """Chunks of plain tokens for `answer`, whose response carries no length: chunked, then.

    Attributes:
        connection: set while the response is being sent.
    """

    __slots__ = ("_answer", "_parts", "_with_ids", "connection")

    def __init__(self, answer: Answer) -> None:
        self._answer = answer
        self._parts: dict[bool, tuple[bytes, bytes, bytes]] = {}
        self._with_ids = answer.returns_token_ids
        self.connection: Connection | None = None

    def open(self, scope: Scope) -> None:
        """Write to the connection of `scope` from now on, where there is one."""
        self.connection = scope.get("extensions", {}).get(_EXTENSION)

    @property
    def is_open(self) -> bool:
        """Whether `write` may be called now."""
        return self.connection is not None and self.connection.is_writable

    def write(self, text: str, token_id: int) -> None:
        """One chunk; none where there is nothing to tell."""
        assert self.connection is not None
        if not text and not self._with_ids:
            return
        parts = self._parts.get(bool(text))
        if parts is None:
            parts = self._parts[bool(text)] = self._answer.plain_chunk(has_text=bool(text))
        head, middle, tail = parts
        shown = orjson.dumps(text) if text else b""
        self.connection.write(b"".join((head, shown, middle, b"%d" % token_id if self._with_ids else b"", tail)))
