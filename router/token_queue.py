"""What a worker says about one request, on its way from the link to the one consumer. Lives on the event loop.

Plain tokens (see `StepOutputs`) come as their bare ids. While the consumer waits, so while everything before has been
dealt with, a plain token is offered to the tap first; what the tap takes wakes nobody and goes no further. So the usual
token costs no task switch.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from baton.errors import BatonError
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = ["TokenQueue"]

Item = pb.RequestOutput | BatonError | int


class TokenQueue:
    """A queue with one consumer.

    Attributes:
        tap: takes a token id and says whether it has dealt with it.
    """

    __slots__ = ("_items", "_waiter", "tap")

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self.tap: Callable[[int], bool] | None = None

    def put(self, item: Item) -> None:
        """Adds an item and wakes the consumer."""
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def put_token(self, token_id: int) -> None:
        """Offers a plain token to the tap, or adds it."""
        waiter = self._waiter
        if self.tap is None or self._items or waiter is None or waiter.done() or not self.tap(token_id):
            self.put(token_id)

    def empty(self) -> bool:
        """Whether `get` would wait."""
        return not self._items

    async def get(self) -> Item:
        """The next item; for one consumer at a time."""
        while not self._items:
            assert self._waiter is None, "two consumers"
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        return self._items.popleft()
