"""The server's half of an RPC: a handler's task, its request iterator and its context, as `grpc.aio` gives them.

A handler is cancelled when its client goes or its connection breaks, and its request iterator ends. Every exception of
a handler but an abort is a bug.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from typing import TYPE_CHECKING, Any

import grpc
from tests.simulation.network import Connection, Server
from tests.simulation.process import Killed

if TYPE_CHECKING:
    from tests.simulation.calls import Call

__all__ = ["ServerCall"]

_OK = grpc.StatusCode.OK


class _Aborted(grpc.aio.AbortError):
    """`context.abort` was called."""


class ServerCall:
    """The server's half, and the handler's context.

    Attributes:
        task: the handler's.
    """

    def __init__(
        self, connection: Connection, client: Call, server: Server, end_s: float | None, metadata: tuple[Any, ...]
    ) -> None:
        self._connection = connection
        self._client = client
        self._server = server
        self._loop = server.process.loop
        self._end_s = end_s
        self._metadata = metadata
        self._requests: deque[bytes] = deque()
        self._has_ended = False
        self._is_over = False
        self._waiter: asyncio.Future[None] | None = None
        self._trailing: tuple[Any, ...] = ()
        self._status: tuple[grpc.StatusCode, str] = (_OK, "")
        self.task: asyncio.Task[None] | None = None
        self._handler = server.handler(client.method)
        if self._handler is None:
            connection.send(
                False, 20, lambda: client.on_status(grpc.StatusCode.UNIMPLEMENTED, f"no method {client.method}")
            )
            return
        server.calls.add(self)
        self._loop.call_soon(self._begin)

    def _begin(self) -> None:
        if not self._is_over:
            self.task = self._loop.create_task(self._serve(), name=f"serve {self._client.method}")

    # ---------------------------------------------------------------- from the network

    def on_request(self, raw: bytes | None) -> None:
        """A request has come, or None, their end."""
        self._loop.call_soon(self._take, raw)

    def _take(self, raw: bytes | None) -> None:
        if raw is None:
            self._has_ended = True
        else:
            self._requests.append(raw)
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def cancel_from_client(self) -> None:
        """The client has gone."""
        self._loop.call_soon(self.cancel)

    def connection_broke(self, why: str) -> None:
        """The client has gone."""
        del why
        self._loop.call_soon(self.cancel)

    def cancel(self) -> None:
        """Ends the handler."""
        self._has_ended = True
        if self._is_over:
            return
        self._wake()
        if self.task is None:
            self._is_over = True
            self._server.calls.discard(self)
        elif not self.task.done():
            self.task.cancel()

    # ---------------------------------------------------------------- the handler

    async def _serve(self) -> None:
        handler = self._handler
        code, details = _OK, ""
        try:
            if handler.request_streaming:
                request: Any = self._iterate()
            else:
                request = await anext(self._iterate(), None)
                if request is None:
                    raise asyncio.CancelledError
            if handler.response_streaming:
                behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
                async for reply in behavior(request, self):
                    self._send(reply)
                    await asyncio.sleep(0)
            else:
                self._send(await handler.unary_unary(request, self))
            code, details = self._status
        except _Aborted:
            code, details = self._status
        except asyncio.CancelledError:
            code, details = grpc.StatusCode.CANCELLED, "the handler was cancelled"
        except Killed:
            raise
        except Exception as error:
            if not self._server.process.is_dead:
                self._server.network.world.fail(
                    "no stray exception",
                    f"{self._client.method} on {self._server.process.name}: {type(error).__name__}: {error}",
                )
            code, details = grpc.StatusCode.UNKNOWN, str(error)
        finally:
            self._is_over = True
            self._server.calls.discard(self)
        client = self._client
        self._connection.send(False, 30, lambda: client.on_status(code, details))

    def _send(self, reply: Any) -> None:
        raw = self._handler.response_serializer(reply)
        client, connection, network = self._client, self._connection, self._server.network
        verdict = ""
        if network.on_message is not None:
            verdict = network.on_message(self._server.process.name, connection.client.name, client.method, reply)
        if verdict == "drop":
            return
        if verdict == "break":
            connection.send(False, 0, lambda: connection.break_off("connection reset"))
            return
        for _ in range(2 if verdict == "duplicate" else 1):
            connection.send(False, len(raw), lambda: client.on_reply(raw))

    async def _iterate(self) -> AsyncIterator[Any]:
        while True:
            if self._requests:
                yield self._handler.request_deserializer(self._requests.popleft())
                continue
            if self._has_ended:
                return
            self._waiter = self._loop.create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None

    # ---------------------------------------------------------------- the context

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> None:
        """See grpc."""
        del trailing_metadata
        self._status = code, details
        raise _Aborted

    def time_remaining(self) -> float | None:
        """See grpc."""
        return None if self._end_s is None else max(0.0, self._end_s - self._server.network.world.now_s)

    def invocation_metadata(self) -> tuple[Any, ...]:
        """See grpc."""
        return self._metadata

    def peer(self) -> str:
        """See grpc."""
        return f"ipv4:{self._connection.client.name}"

    def set_trailing_metadata(self, metadata: Any) -> None:
        """See grpc."""
        self._trailing = tuple(metadata)

    async def send_initial_metadata(self, metadata: Any) -> None:
        """See grpc."""

    def cancelled(self) -> bool:
        """See grpc."""
        return self.task is not None and self.task.cancelled()

    def done(self) -> bool:
        """See grpc."""
        return self._is_over

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See grpc."""
