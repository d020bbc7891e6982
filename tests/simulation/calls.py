"""The client's half of an RPC: channels and call objects as `grpc.aio` gives them.

What the product relies on is as there: a call that is cancelled here, or whose channel is closed, raises
`CancelledError` where it is awaited or read; one that fails raises `AioRpcError`. The other half is `server_calls.py`.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator
from typing import Any

import grpc
from grpc.aio import EOF, AioRpcError, Metadata
from tests.simulation.network import Connection, Network
from tests.simulation.process import Process
from tests.simulation.server_calls import ServerCall

__all__ = ["Call", "Channel"]

_OK = grpc.StatusCode.OK
_NO_METADATA = Metadata()


class Channel:
    """`grpc.aio.Channel` of a process to an address."""

    def __init__(self, network: Network, process: Process, address: str) -> None:
        self.network = network
        self.process = process
        self.address = address
        self._connection: Connection | None = None
        self._calls: list[Call] = []
        self._is_closed = False

    def connection(self) -> Connection:
        """The present one, or a new one."""
        if self._connection is None or self._connection.is_broken:
            self._connection = Connection(self.network, self.process, self.address)
        return self._connection

    def begin(self, call: Call) -> None:
        """A call is under way."""
        assert not self._is_closed, "the channel is closed"
        self._calls = [other for other in self._calls if not other.done()]
        self._calls.append(call)

    def _multi(self, kind: str, method: str, serializer: Any, deserializer: Any) -> Callable[..., Call]:
        def start(
            request: Any = None,
            *,
            timeout: float | None = None,
            metadata: Any = None,
            wait_for_ready: bool | None = None,
            **_: Any,
        ) -> Call:
            del wait_for_ready
            return Call(self, kind, method, request, serializer, deserializer, timeout, metadata)

        return start

    def unary_unary(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        """See grpc."""
        return self._multi("unary_unary", method, request_serializer, response_deserializer)

    def unary_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        """See grpc."""
        return self._multi("unary_stream", method, request_serializer, response_deserializer)

    def stream_stream(
        self, method: str, request_serializer: Any = None, response_deserializer: Any = None, **_: Any
    ) -> Callable[..., Call]:
        """See grpc."""
        return self._multi("stream_stream", method, request_serializer, response_deserializer)

    async def close(self, grace: float | None = None) -> None:
        """Cancels what runs."""
        del grace
        self._is_closed = True
        calls, self._calls = self._calls, []
        for call in calls:
            call.cancel()
        connection, self._connection = self._connection, None
        if connection is not None and not connection.is_broken:
            connection.send(True, 40, lambda: connection.break_off("the client closed the channel"))
        await asyncio.sleep(0)

    async def __aenter__(self) -> Channel:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


class Call:
    """The client's half."""

    def __init__(
        self,
        channel: Channel,
        kind: str,
        method: str,
        request: Any,
        serializer: Any,
        deserializer: Any,
        timeout_s: float | None,
        metadata: Any,
    ) -> None:
        self._channel = channel
        self._loop = channel.process.loop
        self._world = channel.network.world
        self._kind = kind
        self.method = method
        self._serialize, self._deserialize = serializer, deserializer
        self._status: tuple[grpc.StatusCode, str] | None = None
        self._is_cancelled = False
        self._replies: deque[Any] = deque()
        self._waiters: list[asyncio.Future[None]] = []
        self._callbacks: list[Callable[[Any], None]] = []
        self._aiter: AsyncIterator[Any] | None = None
        self._poller: asyncio.Task[None] | None = None
        channel.begin(self)
        self._connection = connection = channel.connection()
        connection.calls.append(self)
        self._server: ServerCall | None = None
        if timeout_s is not None:
            self._timer = self._loop.call_later(timeout_s, self._deadline, timeout_s)
        else:
            self._timer = None
        end_s = None if timeout_s is None else self._world.now_s + timeout_s
        connection.send(
            True, 50, lambda: connection.when_accepted(lambda: self._open(connection, end_s, tuple(metadata or ())))
        )
        if kind == "stream_stream":
            if request is not None:
                self._poller = self._loop.create_task(self._poll(request), name=f"requests {method}")
        else:
            self._send(request)
            self._send_end()

    # ---------------------------------------------------------------- out

    def _open(self, connection: Connection, end_s: float | None, metadata: tuple[Any, ...]) -> None:
        """At the server: the call arrives."""
        if self._status is None and connection.server is not None:
            self._server = ServerCall(connection, self, connection.server, end_s, metadata)

    def _send(self, message: Any) -> None:
        raw = self._serialize(message)
        network, connection = self._channel.network, self._connection
        verdict = ""
        if network.on_message is not None:
            verdict = network.on_message(self._channel.process.name, connection.server_name, self.method, message)
        if verdict == "drop":
            return
        if verdict == "break":
            connection.send(True, 0, lambda: connection.break_off("connection reset"))
            return
        for _ in range(2 if verdict == "duplicate" else 1):
            connection.send(True, len(raw), lambda: self._server and self._server.on_request(raw))

    def _send_end(self) -> None:
        self._connection.send(True, 10, lambda: self._server and self._server.on_request(None))

    async def _poll(self, requests: Any) -> None:
        async for request in requests:
            if self.done():
                return
            self._send(request)
            await asyncio.sleep(0)
        self._send_end()

    async def write(self, message: Any) -> None:
        """See grpc."""
        if self.done():
            await self._raise_for_status()
            raise asyncio.InvalidStateError("RPC already finished.")
        self._send(message)
        await asyncio.sleep(0)
        if self.done():
            await self._raise_for_status()

    async def done_writing(self) -> None:
        """See grpc."""
        self._send_end()

    # ---------------------------------------------------------------- in

    def on_reply(self, raw: bytes | None) -> None:
        """A message has come; the loop is told."""
        self._loop.call_soon(self._take, raw)

    def on_status(self, code: grpc.StatusCode, details: str) -> None:
        """The end has come."""
        self._loop.call_soon(self._finish, code, details)

    def connection_broke(self, why: str) -> None:
        """Both halves are told, each by its own kernel."""
        self.on_status(grpc.StatusCode.UNAVAILABLE, why)
        if self._server is not None:
            self._server.connection_broke(why)

    def _take(self, raw: bytes) -> None:
        if self._status is None:
            self._replies.append(raw)
            self._wake()

    def _wake(self) -> None:
        waiters, self._waiters = self._waiters, []
        for waiter in waiters:
            if not waiter.done():
                waiter.set_result(None)

    def _deadline(self, timeout_s: float) -> None:
        if self._status is None:
            self._tell_server_cancel()
            self._finish(grpc.StatusCode.DEADLINE_EXCEEDED, f"Deadline Exceeded after {timeout_s:g} s")

    def _finish(self, code: grpc.StatusCode, details: str) -> None:
        if self._status is not None:
            return
        self._status = code, details
        if self._timer is not None:
            self._timer.cancel()
        if self._poller is not None:
            self._poller.cancel()
        if self in self._connection.calls:
            self._connection.calls.remove(self)
        self._wake()
        for callback in self._callbacks:
            callback(self)

    def _tell_server_cancel(self) -> None:
        self._connection.send(True, 20, lambda: self._server and self._server.cancel_from_client())

    # ---------------------------------------------------------------- what the product calls

    def cancel(self) -> bool:
        """See grpc."""
        if self._status is not None:
            return False
        self._is_cancelled = True
        self._replies.clear()
        self._tell_server_cancel()
        self._finish(grpc.StatusCode.CANCELLED, "Locally cancelled by application!")
        return True

    def cancelled(self) -> bool:
        """See grpc."""
        return self._status is not None and self._status[0] is grpc.StatusCode.CANCELLED

    def done(self) -> bool:
        """See grpc."""
        return self._status is not None

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """See grpc."""
        self._callbacks.append(callback)

    async def code(self) -> grpc.StatusCode:
        """See grpc."""
        while self._status is None:
            await self._wait()
        return self._status[0]

    async def details(self) -> str:
        """See grpc."""
        await self.code()
        assert self._status is not None
        return self._status[1]

    async def initial_metadata(self) -> Metadata:
        """See grpc."""
        return _NO_METADATA

    async def _wait(self) -> None:
        waiter: asyncio.Future[None] = self._loop.create_future()
        self._waiters.append(waiter)
        try:
            await waiter
        except asyncio.CancelledError:
            self.cancel()
            raise

    async def _raise_for_status(self) -> None:
        assert self._status is not None
        code, details = self._status
        if self._is_cancelled:
            raise asyncio.CancelledError
        if code is not _OK:
            raise AioRpcError(code, _NO_METADATA, _NO_METADATA, details=details)

    async def read(self) -> Any:
        """See grpc."""
        while not self._replies:
            if self._status is not None:
                await self._raise_for_status()
                return EOF
            await self._wait()
        return self._deserialize(self._replies.popleft())

    def __aiter__(self) -> AsyncIterator[Any]:
        if self._aiter is None:
            self._aiter = self._iterate()
        return self._aiter

    async def _iterate(self) -> AsyncIterator[Any]:
        while (message := await self.read()) is not EOF:
            yield message

    def __await__(self) -> Generator[Any, None, Any]:
        return self._reply().__await__()

    async def _reply(self) -> Any:
        while self._status is None:
            await self._wait()
        await self._raise_for_status()
        return self._deserialize(self._replies.popleft())
