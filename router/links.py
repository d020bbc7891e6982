"""One long-lived token stream to one decode worker, shared by all requests of this router.

    (down) --connect, Hello, Welcome--> UP --stream breaks--> (down) --back-off--> connect again ... until closed

A worker with nothing to say sends beats, several within `silence_s`; a stream that is silent for longer breaks: its
worker is stopped, stuck or cut off. Going down tells every live request on the stream (`LinkBrokenError` in its queue);
what happens to it then is the dispatcher's business. Commands and events keep their order, and are numbered: where one
is missing the stream breaks too (see `proto.stream_order`).
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable

import grpc

from baton import faults
from baton.errors import BatonError
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.stream_end import Requests, end_stream, is_being_cancelled
from baton.proto.stream_order import SequenceGapError, StreamOrder
from baton.router.channels import is_ping_lost, open_channel
from baton.router.instances import Instance
from baton.router.news_sink import NewsSink, NoSink
from baton.router.token_queue import TokenQueue

__all__ = ["PROTOCOL_VERSION", "DecodeLink", "Key", "LinkBrokenError"]

_log = logging.getLogger(__name__)

PROTOCOL_VERSION = 2
_LOOKS_PER_SILENCE = 4
_LATE_LOOK = 10  # a look that comes later than this part of the time between looks found the loop busy
_WELCOME_TIMEOUT_S = 5.0
_MAX_NUMBER = 2**32 - 1
_BACKOFF_S = (0.05, 0.1, 0.2, 0.5, 1.0)

Key = tuple[str, int]
"""(request id, attempt)."""


class LinkBrokenError(BatonError):
    """The stream to a decode worker broke while a request was on it, or it gave the request up. Never reaches a client.

    Attributes:
        has_died: the worker was lost, as far as can be told.
        is_silent: it was not seen to end, but said nothing for too long.
    """

    def __init__(self, message: str, *, has_died: bool = True, is_silent: bool = False) -> None:
        super().__init__(message)
        self.has_died = has_died
        self.is_silent = is_silent


class DecodeLink:
    """The stream to `instance`.

    Args:
        router_id: how this router names itself.
        silence_s: how long a living worker may say nothing.
        on_change: called after the link came up or went down.
        on_load: called after the worker said how it is.
        sink: takes what the worker tells besides tokens.
    """

    def __init__(
        self,
        instance: Instance,
        *,
        router_id: str,
        silence_s: float,
        on_change: Callable[[], None],
        on_load: Callable[[], None] = lambda: None,
        sink: NewsSink | None = None,
    ) -> None:
        self.instance = instance
        self._sink = sink or NoSink()
        self._silence_s = silence_s
        self._is_silent = False
        self._heard = False
        self._router_id = router_id
        self._on_change = on_change
        self._on_load = on_load
        self._live: dict[Key, TokenQueue] = {}
        self._numbers: dict[Key, int] = {}
        self._numbered: dict[int, TokenQueue] = {}
        self._last_number = 0
        self._commands: Requests[pb.DecodeCommand] = Requests()
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Connect, and again after every break, until `close`."""
        self._task = asyncio.create_task(self._run(), name=f"link {self.instance.instance_id}")

    async def close(self) -> None:
        """Break the stream for good."""
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        self._down(f"the link to {self.instance.instance_id} was closed")

    def submit(self, command: pb.DecodeCommand) -> TokenQueue:
        """Send a request (a `Submit`), numbered here; its outputs come through the returned queue.

        Raises:
            LinkBrokenError: the stream is down.
        """
        if not self.instance.connected:
            raise LinkBrokenError(f"the stream to {self.instance.instance_id} is down", has_died=False)
        submit = command.submit
        key = (submit.request.request_id, submit.request.attempt)
        assert key not in self._live, key
        queue = TokenQueue()
        self._last_number = submit.number = self._free_number()
        self._live[key] = self._numbered[submit.number] = queue
        self._numbers[key] = submit.number
        self._commands.put(command)
        return queue

    def forget(self, key: Key) -> None:
        """The request is over or no longer wanted; if it still runs there, stop it."""
        if self._end(key) is not None and self.instance.connected:
            self._commands.put(pb.DecodeCommand(cancel=pb.Cancel(request_id=key[0], attempt=key[1])))

    def abandon(self, reason: str) -> None:
        """Every request here goes on elsewhere; the worker is told as each consumer forgets it."""
        for queue in self._live.values():
            queue.put(LinkBrokenError(reason, has_died=False))

    def prefill_failed(self, key: Key, reason: str, next_handover: int = 0) -> None:
        """Tell the worker to compute the prompt itself, or to await another prefill worker under this number."""
        if key in self._live:
            failed = pb.PrefillFailed(request_id=key[0], attempt=key[1], reason=reason, next_handover=next_handover)
            self._commands.put(pb.DecodeCommand(prefill_failed=failed))

    def ask_for_snapshot(self) -> None:
        """Some of what the worker told of its blocks was missed."""
        if self.instance.connected:
            self._commands.put(pb.DecodeCommand(send_snapshot=pb.SendSnapshot()))

    def is_live(self, key: Key) -> bool:
        """Whether the request has not ended there."""
        return key in self._live

    async def _run(self) -> None:
        failures = 0
        while True:
            reason, is_silent = "the worker closed the stream", False
            async with open_channel(self.instance.status.address) as channel:
                try:
                    async for event in self._events(channel):
                        failures = 0
                        self._handle(event)
                except grpc.aio.AioRpcError as error:
                    reason, is_silent = f"{error.code().name}: {error.details()}", is_ping_lost(error)
                except asyncio.CancelledError:
                    if not self._is_silent or is_being_cancelled():
                        raise
                    self._is_silent = False  # a later cancellation is another one
                    reason, is_silent = f"it said nothing for {self._silence_s:g} s", True
                except (TimeoutError, LinkBrokenError, SequenceGapError) as error:
                    reason = str(error) or f"no Welcome within {_WELCOME_TIMEOUT_S:.0f} s"
            was_up = self.instance.connected
            self._down(f"the stream to {self.instance.instance_id} broke: {reason}", is_silent=is_silent)
            if was_up or failures == 0:
                _log.warning("stream to %s (%s): %s", self.instance.instance_id, self.instance.status.address, reason)
            await asyncio.sleep(_BACKOFF_S[min(failures, len(_BACKOFF_S) - 1)])
            failures += 1

    async def _events(self, channel: grpc.aio.Channel) -> AsyncIterator[pb.DecodeEvent]:
        commands: Requests[pb.DecodeCommand] = Requests()
        hello = pb.Hello(router_id=self._router_id, protocol_version=PROTOCOL_VERSION)
        commands.put(pb.DecodeCommand(hello=hello))
        call = rpc.DecodeStub(channel).Stream(_numbered(commands))
        events = aiter(call)
        order = StreamOrder()
        try:
            async with asyncio.timeout(_WELCOME_TIMEOUT_S):
                first = await anext(events, None)
            if first is None or first.WhichOneof("event") != "welcome":
                raise LinkBrokenError("the worker did not begin with Welcome")
            order.accept(first.seq)
            expected = self.instance.status.incarnation
            if first.welcome.incarnation != expected:
                raise LinkBrokenError("another process answers at this address; waiting for the registry to name it")
            self._commands = commands
            self.instance.connected = True
            self.instance.welcomes += 1
            self._sink.opened(self.instance)
            yield first
            self._on_change()
            watch = asyncio.create_task(self._watch(call), name=f"silence of {self.instance.instance_id}")
            try:
                async for event in events:
                    if order.accept(event.seq):
                        yield event
            finally:
                watch.cancel()
        finally:
            await end_stream(call, events, commands)

    async def _watch(self, call: grpc.aio.Call) -> None:
        """Breaks a stream on which nothing came for `silence_s`."""
        loop = asyncio.get_running_loop()
        period_s = self._silence_s / _LOOKS_PER_SILENCE
        self._is_silent, silent = False, 0
        while True:
            due_s = loop.time() + period_s
            await asyncio.sleep(period_s)
            # Where this loop itself was busy, what the worker has sent may not have been read yet: that look is none.
            is_busy = loop.time() - due_s > period_s / _LATE_LOOK
            silent = 0 if self._heard else silent + (not is_busy)
            self._heard = False
            if silent >= _LOOKS_PER_SILENCE:
                self._is_silent = True
                call.cancel()
                return

    def _handle(self, event: pb.DecodeEvent) -> None:
        self._heard = True
        if event.HasField("load"):
            self.instance.load = event.load
            self._on_load()
        if event.blocks and self._sink.blocks(self.instance, event.blocks):
            self.ask_for_snapshot()
        if event.steps:
            self._sink.steps(self.instance, event.steps)
        step = event.step
        if faults.active is not None:
            faults.strike("emit", count=len(step.token_ids) + sum(len(output.token_ids) for output in step.outputs))
        numbered = self._numbered
        for number, token_id in zip(step.numbers, step.token_ids, strict=True):
            queue = numbered.get(number)
            if queue is not None:
                queue.put_token(token_id)
        for output in step.outputs:
            key = (output.request_id, output.attempt)
            queue = self._live.get(key)
            if queue is not None:
                if output.finish_reason:
                    self._end(key)
                queue.put(output)

    def _free_number(self) -> int:
        number = self._last_number % _MAX_NUMBER + 1
        while number in self._numbered:
            number = number % _MAX_NUMBER + 1
        return number

    def _end(self, key: Key) -> TokenQueue | None:
        self._numbered.pop(self._numbers.pop(key, 0), None)
        return self._live.pop(key, None)

    def _down(self, reason: str, *, is_silent: bool = False) -> None:
        was_up, self.instance.connected = self.instance.connected, False
        live, self._live = self._live, {}
        self._numbers, self._numbered = {}, {}
        for queue in live.values():
            queue.put(LinkBrokenError(reason, is_silent=is_silent))
        if was_up:
            self._sink.closed(self.instance)
            self._on_change()


async def _numbered(commands: Requests[pb.DecodeCommand]) -> AsyncIterator[pb.DecodeCommand]:
    order = StreamOrder()
    async for command in commands:
        command.seq = order.next()
        yield command
