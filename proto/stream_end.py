"""How a stream ends so that nothing of it stays: neither its connection's socket nor what gRPC keeps for it.

A call of `grpc.aio` and the generator of its answers hold each other until the generator has ended, and a task of the
call waits at the iterator of requests until that one has. Either keeps call, channel and socket alive after both are
closed, until Python's cycle collector comes by: for minutes, in a process that has little to collect.

    requests = Requests()                           each `put` goes out in order, until `end`
    call = stub.Stream(requests)
    answers = aiter(call)
    try: ... anext(answers) ...
    finally: await end_stream(call, answers, requests)
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Generic, TypeVar

import grpc

__all__ = ["Requests", "end_stream", "is_being_cancelled"]

_T = TypeVar("_T")


class Requests(Generic[_T]):
    """What a stream sends, as an iterator that can be ended from outside."""

    def __init__(self) -> None:
        self._waiting: asyncio.Queue[_T | None] = asyncio.Queue()

    def put(self, request: _T) -> None:
        """Send one more."""
        self._waiting.put_nowait(request)

    def end(self) -> None:
        """There will be no more."""
        self._waiting.put_nowait(None)

    async def __aiter__(self) -> AsyncIterator[_T]:
        while (request := await self._waiting.get()) is not None:
            yield request


async def end_stream(call: grpc.aio.Call, answers: AsyncIterator[Any], requests: Requests[Any] | None = None) -> None:
    """Cancels `call`, where it has not ended, and lets go of it.

    Args:
        answers: the one iterator over it; nobody waits for its next answer any more.
    """
    call.cancel()
    if requests is not None:
        requests.end()
    close = getattr(answers, "aclose", None)
    if close is not None:
        await close()


def is_being_cancelled() -> bool:
    """Whether the current task is asked to end. In a handler of CancelledError: else something inside it was cancelled.

    A handler must not hold the task itself: it would stay in the frame that the error keeps, and the task keeps that.
    """
    task = asyncio.current_task()
    return task is None or task.cancelling() > 0
