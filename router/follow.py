"""What one prefill worker tells of itself, as it happens: a stream of its load, its blocks and its steps.

    (down) --connect, first message--> UP --it breaks, is silent, or something was missed--> (down) --back-off--> again

No request depends on it: while it is down the load is that of the worker's replies and announcements, and its blocks
are what was known last, see `block_feed.py`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from baton.errors import BatonError
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.stream_end import end_stream
from baton.router.channels import open_channel
from baton.router.instances import Instance
from baton.router.news_sink import NewsSink

__all__ = ["Follow"]

_log = logging.getLogger(__name__)
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)
_FIRST_TIMEOUT_S = 5.0


class _BrokenError(BatonError):
    """The stream cannot be gone on with."""


class Follow:
    """The stream from `instance`.

    Args:
        router_id: how this router names itself.
        silence_s: how long a living worker may say nothing.
        sink: who takes what it says.
        on_load: called after the worker said how it is.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        router_id: str,
        silence_s: float,
        sink: NewsSink,
        on_load: Callable[[], None] = lambda: None,
    ) -> None:
        self.instance = instance
        self._router_id = router_id
        self._silence_s = silence_s
        self._sink = sink
        self._on_load = on_load
        self._task: asyncio.Task[None] | None = None
        self._restart = False

    def start(self) -> None:
        """Connect, and again after every break, until `close`."""
        self._task = asyncio.create_task(self._run(), name=f"follow {self.instance.instance_id}")

    async def close(self) -> None:
        """Break the stream for good."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._down()

    def ask_for_snapshot(self) -> None:
        """Begin anew with the next message: a new stream begins with a snapshot."""
        self._restart = True

    async def _run(self) -> None:
        failures = 0
        while True:
            reason = "the worker closed the stream"
            async with open_channel(self.instance.status.address) as channel:
                call = rpc.WorkerStub(channel).Follow(pb.FollowRequest(router_id=self._router_id))
                news = aiter(call)
                try:
                    async with asyncio.timeout(max(_FIRST_TIMEOUT_S, self._silence_s)):
                        first = await anext(news, None)
                    if first is not None:
                        self._up(first)
                        failures = 0
                        await self._read(news)
                except grpc.aio.AioRpcError as error:
                    reason = f"{error.code().name}: {error.details()}"
                except TimeoutError:
                    reason = "it said nothing in time"
                except _BrokenError as error:
                    reason = error.message
                finally:
                    await end_stream(call, news)
            self._down()
            if failures == 0:
                _log.warning("%s is not followed for a while: %s", self.instance.instance_id, reason)
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1

    async def _read(self, stream: AsyncIterator[pb.WorkerNews]) -> None:
        while True:
            async with asyncio.timeout(self._silence_s):
                news = await anext(stream, None)
            if news is None:
                return
            self._take(news)
            if self._restart:
                raise _BrokenError("some of what it said was missed")

    def _up(self, first: pb.WorkerNews) -> None:
        if first.incarnation != self.instance.status.incarnation:
            raise _BrokenError("another process answers at this address; waiting for the registry to name it")
        self._restart = False
        self.instance.is_followed = True
        self._sink.opened(self.instance)
        self._take(first)

    def _take(self, news: pb.WorkerNews) -> None:
        if news.HasField("load"):
            self.instance.load = news.load
            self._on_load()
        if news.blocks and self._sink.blocks(self.instance, news.blocks):
            self._restart = True
        if news.steps:
            self._sink.steps(self.instance, news.steps)

    def _down(self) -> None:
        if self.instance.is_followed:
            self.instance.is_followed = False
            self._sink.closed(self.instance)
