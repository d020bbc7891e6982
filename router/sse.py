"""Server-sent events over ASGI: pre-encoded bytes, a client that leaves stops the work, one that never reads too.

ClientWatch        whether the client is still there: one for each request, from its first wait to its end
prime(...)         wait a moment for the first delta, so that early errors keep their HTTP status
EventStream        the response
until_gone(...)    the same watch for answers that are not streamed
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncGenerator, Awaitable, Coroutine, Mapping
from typing import Any, TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from baton.errors import BatonError, CancelledError
from baton.router import limits
from baton.router.answered_once import Claim
from baton.router.client import ChoiceDelta
from baton.router.direct import DirectStream
from baton.router.protocol.answers import Answer
from baton.router.protocol.errors import error_body

__all__ = ["ClientWatch", "EventStream", "PrimedDeltas", "event_frames", "prime", "until_gone"]

_log = logging.getLogger(__name__)
_Result = TypeVar("_Result")
_DONE = b"data: [DONE]\n\n"
_FIRST_DELTA_WAIT_S = 5.0
_STREAM_HEADERS = {"Content-Type": "text/event-stream; charset=utf-8", "Cache-Control": "no-cache"}


def frame(event: Mapping[str, Any]) -> bytes:
    """One event."""
    return b"data: " + orjson.dumps(event) + b"\n\n"


class PrimedDeltas:
    """Deltas whose first one is already being waited for. `aclose` stops the work, whether or not any was taken."""

    def __init__(self, first: asyncio.Future[ChoiceDelta | None], rest: AsyncGenerator[ChoiceDelta, None]) -> None:
        self._first: asyncio.Future[ChoiceDelta | None] | None = first
        self._rest = rest

    def __aiter__(self) -> PrimedDeltas:
        return self

    async def __anext__(self) -> ChoiceDelta:
        """The next delta."""
        if self._first is None:
            return await anext(self._rest)
        delta = await self._first
        self._first = None
        if delta is None:
            raise StopAsyncIteration
        return delta

    async def aclose(self) -> None:
        """Stop the work; may be called again."""
        if self._first is not None:
            await _stop(self._first)
        await self._rest.aclose()


async def event_frames(answer: Answer, deltas: PrimedDeltas, claim: Claim | None = None) -> AsyncGenerator[bytes, None]:
    """The whole stream of `answer`; a failure becomes an error event, and [DONE] always comes last.

    Args:
        claim: keeps the stream, unless it fails.
    """
    record = claim.add if claim is not None else _forget
    async with contextlib.aclosing(deltas):
        try:
            data = b"".join(map(frame, answer.opening()))
            record(data)
            yield data
            async for delta in deltas:
                data = b"".join(map(frame, answer.chunks(delta)))
                if data:
                    record(data)
                    yield data
            data = b"".join(map(frame, answer.closing())) + _DONE
            if claim is not None:
                # Before its end is sent: who saw the end may count on the answer being kept.
                record(data)
                await claim.keep(_STREAM_HEADERS)
            yield data
        except BatonError as error:
            yield frame(error_body(error)) + _DONE
        except Exception:
            _log.exception("a stream failed")
            yield frame(error_body(BatonError("internal error; the router's log has the details"))) + _DONE


class ClientWatch:
    """Sees the client of one request leave; `close` it when the request is over."""

    def __init__(self, receive: Receive) -> None:
        self._gone = asyncio.ensure_future(_disconnected(receive))

    async def wait_for(self, work: asyncio.Future[Any], *, timeout_s: float | None = None) -> bool:
        """Whether `work` is done (False: the time is over). Raises `CancelledError` when the client leaves first."""
        await asyncio.wait({work, self._gone}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
        if self._gone.done() and not work.done():
            raise CancelledError("the client closed the connection")
        return work.done()

    async def close(self) -> None:
        """Watch no more; may be called again."""
        await _stop(self._gone)


async def prime(
    deltas: AsyncGenerator[ChoiceDelta, None], watch: ClientWatch
) -> tuple[ChoiceDelta | None, PrimedDeltas]:
    """The first delta (None if it takes long) and all deltas, the first one included.

    Raises:
        BatonError: what went wrong before the first delta; `CancelledError` when the client left.
    """
    first: asyncio.Future[ChoiceDelta | None] = asyncio.ensure_future(_next_or_none(deltas))
    try:
        done = await watch.wait_for(first, timeout_s=_FIRST_DELTA_WAIT_S)
    except BaseException:
        await _stop(first)
        await deltas.aclose()
        raise
    return (first.result() if done else None), PrimedDeltas(first, deltas)


async def until_gone(work: Coroutine[Any, Any, _Result], request: Request) -> _Result:
    """The result of `work`, which is cancelled when the client leaves.

    Raises:
        CancelledError: the client left.
    """
    task, watch = asyncio.ensure_future(work), ClientWatch(request.receive)
    try:
        await watch.wait_for(task)
        return task.result()
    finally:
        await _stop(task)
        await watch.close()


class EventStream(Response):
    """`text/event-stream` of pre-encoded frames, made from `source`, which is closed in any case.

    Args:
        watch: closed when the stream is over.
        direct: may write to the connection too, from the second frame on.
        claim: released when the stream is over, however it ends.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        frames: AsyncGenerator[bytes, None],
        source: PrimedDeltas,
        headers: Mapping[str, str],
        watch: ClientWatch,
        direct: DirectStream | None = None,
        claim: Claim | None = None,
    ) -> None:
        super().__init__(headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._frames = frames
        self._source = source
        self._watch = watch
        self._direct = direct
        self._claim = claim

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send everything, or stop when the client is gone or does not read."""
        if self._direct is not None:
            self._direct.open(scope)
        pump = asyncio.ensure_future(self._pump(send))
        try:
            await self._watch.wait_for(pump)
            pump.result()
        except (CancelledError, OSError):
            _log.info("the client left in the middle of a stream (499)")
        except TimeoutError:
            _log.warning("a client read nothing for %.0f s; its stream was ended", limits.SEND_STALL_TIMEOUT_S)
        finally:
            await _stop(pump)
            await self._watch.close()
            # A pump that was stopped before it began has closed nothing.
            await self._source.aclose()
            if self._claim is not None:
                await self._claim.release()

    async def _pump(self, send: Send) -> None:
        async with contextlib.aclosing(self._frames) as frames:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for data in frames:
                if data:
                    async with asyncio.timeout(limits.SEND_STALL_TIMEOUT_S):
                        await send({"type": "http.response.body", "body": data, "more_body": True})
            await send({"type": "http.response.body", "body": b"", "more_body": False})


def _forget(data: bytes) -> None:
    """What becomes of the pieces of an answer that nobody keeps."""


async def _next_or_none(deltas: AsyncGenerator[ChoiceDelta, None]) -> ChoiceDelta | None:
    return await anext(deltas, None)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def _stop(future: asyncio.Future[Any]) -> None:
    """Cancel `future` and wait until it has cleaned up; its result is nobody's concern any more."""
    if future.done():
        if not future.cancelled():
            future.exception()  # which nobody else may ask for
        return
    future.cancel()
    waiting: Awaitable[Any] = asyncio.gather(future, return_exceptions=True)
    await waiting
