"""Calls on a faulty channel (see `faulty_channel.py`): each message passes the rules of its direction, as bytes.

A call's end, its deadline and its cancelling take effect at once, whatever a rule holds up. Everything runs on the
event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import weakref
from collections import deque
from collections.abc import AsyncIterable, AsyncIterator, Callable
from typing import Any

import grpc

from baton.proto.faulty_link import CallLink
from baton.proto.stream_end import end_stream, is_being_cancelled

__all__ = ["FaultyCall", "StreamCall", "UnaryCall"]

# The type stubs of grpc lack it.
_EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]


class FaultyCall:
    """What calls of both kinds have in common."""

    def __init__(self, link: CallLink) -> None:
        self._link = link
        # Weakly: the link must not keep the call, nor the call its channel's socket, until the collector comes.
        link.break_off = _weakly(self._break)
        self._inner: Any = None
        self._is_cancelled = False

    def cancel(self) -> bool:
        """Ends the call for both sides; what is held up ends too."""
        was_open = not self.done()
        self._is_cancelled = self._is_cancelled or was_open
        self._link.ended.set()
        if self._inner is not None:
            self._inner.cancel()
        return was_open

    def done(self) -> bool:
        """Whether it has ended."""
        if self._inner is None or self._link.ended.is_set() or self._link.receive.is_dead:
            return self._link.ended.is_set()
        return bool(self._inner.done())

    def cancelled(self) -> bool:
        """Whether it was ended by `cancel`."""
        return self._is_cancelled

    def _break(self) -> None:
        """The other side learns of a failure as of a caller that is gone."""
        if self._inner is not None:
            self._inner.cancel()

    def _raise_failure(self) -> None:
        if self._link.failure is not None:
            raise self._link.failure.error()

    async def code(self) -> grpc.StatusCode:
        """How it has ended; waits for the end."""
        if self._link.failure is not None:
            return self._link.failure.code
        code: grpc.StatusCode = await self._inner.code() if self._inner is not None else grpc.StatusCode.CANCELLED
        return code

    async def details(self) -> str:
        """Why it has ended; waits for the end."""
        if self._link.failure is not None:
            return self._link.failure.details
        return str(await self._inner.details()) if self._inner is not None else ""


class UnaryCall(FaultyCall):
    """A call of one message each way: awaited for the answer."""

    def __init__(self, multi_callable: Any, link: CallLink, request: Any, arguments: dict[str, Any], **_: Any) -> None:
        super().__init__(link)
        self._multi_callable = multi_callable
        self._arguments = arguments
        self._extra: Any = None
        self._task = asyncio.ensure_future(self._run(request, arguments.pop("timeout", None)))
        self._task.add_done_callback(lambda _: link.ended.set())

    def __await__(self) -> Any:
        answer = yield from self._task.__await__()
        if isinstance(answer, grpc.aio.AioRpcError):
            # Another one: raised, it keeps this frame, and the task keeps its own.
            raise copy.copy(answer)
        return answer

    def cancel(self) -> bool:
        """See `FaultyCall`."""
        return self._task.cancel()

    def done(self) -> bool:
        """See `FaultyCall`."""
        return self._task.done()

    def cancelled(self) -> bool:
        """See `FaultyCall`."""
        return self._task.cancelled()

    async def _run(self, request: Any, timeout_s: float | None) -> Any:
        """The answer, or the error, which no frame has seen."""
        try:
            return await self._ask(request, timeout_s)
        except grpc.aio.AioRpcError as error:
            return copy.copy(error)

    async def _ask(self, request: Any, timeout_s: float | None) -> Any:
        try:
            async with asyncio.timeout(timeout_s) as timeout:
                self._link.begin()
                messages = await self._link.send.carry(self._link.to_bytes(request))
                when_s = timeout.when()
                left_s = None if when_s is None else max(0.001, when_s - asyncio.get_running_loop().time())
                calls = [self._multi_callable(message, timeout=left_s, **self._arguments) for message in messages]
                if calls:
                    self._inner, self._extra = calls[0], calls[1:]
                    answers = await self._link.receive.carry(await self._inner)
                    if answers:
                        return self._link.from_bytes(answers[0])
                await self._link.ended.wait()  # lost: until the deadline
                self._raise_failure()
        except asyncio.CancelledError:
            if not is_being_cancelled():
                self._raise_failure()
            raise
        except TimeoutError:
            raise self._link.fail(grpc.StatusCode.DEADLINE_EXCEEDED, "Deadline Exceeded") from None


class StreamCall(FaultyCall):
    """A call with many answers: read or iterated over; with one request, an iterator of them, or `write`."""

    def __init__(
        self, multi_callable: Any, link: CallLink, request: Any, arguments: dict[str, Any], *, is_unary: bool
    ) -> None:
        super().__init__(link)
        self._arrived: deque[bytes] = deque()
        self._begin: Callable[[Any], Any] | None = None
        self._request = request
        try:
            link.begin()
        except grpc.aio.AioRpcError:
            return
        if is_unary:
            # The request has to pass before the call inside can be made.
            self._begin = lambda message: multi_callable(message, **arguments)
        else:
            requests = None if request is None else self._outgoing(request)
            self._inner = multi_callable(requests, **arguments)

    async def read(self) -> Any:
        """The next answer, or EOF."""
        await self._begun()
        return await self._next(self._inner.read)

    async def __aiter__(self) -> AsyncIterator[Any]:
        await self._begun()
        answers = aiter(self._inner)
        try:
            while (message := await self._next(lambda: anext(answers, _EOF))) is not _EOF:
                yield message
        finally:
            await end_stream(self._inner, answers)

    async def write(self, message: Any) -> None:
        """Sends one."""
        self._raise_failure()
        try:
            for data in await self._link.send.carry(self._link.to_bytes(message)):
                await self._inner.write(data)
        except (grpc.aio.AioRpcError, asyncio.InvalidStateError):
            self._raise_failure()
            raise

    async def done_writing(self) -> None:
        """No more will be sent."""
        self._raise_failure()
        if not self._link.send.is_dead:
            await self._inner.done_writing()

    async def wait_for_connection(self) -> None:
        """Until the other side has taken the call."""
        await self._begun()
        await self._inner.wait_for_connection()

    async def _begun(self) -> None:
        """The call inside is made."""
        self._raise_failure()
        if self._begin is not None:
            begin, self._begin = self._begin, None
            messages = await self._link.send.carry(self._link.to_bytes(self._request))
            if not messages:
                await self._link.ended.wait()
                raise asyncio.CancelledError
            self._inner = begin(messages[0])

    async def _next(self, read: Callable[[], Any]) -> Any:
        while not self._arrived:
            self._raise_failure()
            try:
                data = await self._read_inside(read)
                if data is _EOF:
                    self._link.ended.set()
                    return _EOF
                self._arrived.extend(await self._link.receive.carry(data))
            except asyncio.CancelledError:
                if not is_being_cancelled():
                    self._raise_failure()
                raise
        return self._link.from_bytes(self._arrived.popleft())

    async def _read_inside(self, read: Callable[[], Any]) -> Any:
        """What comes; out of a black hole not even the end does."""
        try:
            data = await read()
            if data is not _EOF or not self._link.receive.is_dead:
                return data
        except grpc.aio.AioRpcError:
            if not self._link.receive.is_dead:
                self._link.ended.set()
                raise
        await self._link.ended.wait()
        raise asyncio.CancelledError

    async def _outgoing(self, requests: Any) -> AsyncIterator[bytes]:
        # The call inside is broken off where a message breaks the call: who reads is told.
        with contextlib.suppress(grpc.aio.AioRpcError):
            async for request in requests if isinstance(requests, AsyncIterable) else _each(requests):
                for data in await self._link.send.carry(self._link.to_bytes(request)):
                    yield data
            if self._link.send.is_dead:
                # Nor does the other side hear that this was all.
                await self._link.ended.wait()


def _weakly(method: Callable[[], object]) -> Callable[[], object]:
    reference = weakref.WeakMethod(method)

    def call() -> None:
        alive = reference()
        if alive is not None:
            alive()

    return call


async def _each(requests: Any) -> AsyncIterator[Any]:
    for request in requests:
        yield request
