"""What a decode worker remembers of a router's stream and of each request on it. Lives on the event loop."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field

from baton.decode_worker.phases import Moments
from baton.decode_worker.remote_prefill import RemotePrefill
from baton.engine.sequence import Key
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.stream_order import StreamOrder
from baton.worker.news import Listener, News

__all__ = ["Live", "Session"]


@dataclass(slots=True, eq=False)
class Session:
    """One `Decode.Stream`: events wait in `outbox` for the router to read them (bounded by what its requests emit).

    None in the outbox ends the stream, an event of no kind is filled with news when its turn has come. `order` is that
    of the commands that come.
    """

    router_id: str
    outbox: asyncio.Queue[pb.DecodeEvent | None] = field(default_factory=asyncio.Queue)
    keys: set[Key] = field(default_factory=set)
    order: StreamOrder = field(default_factory=StreamOrder)
    _listener: Listener | None = None

    def listen(self, news: News) -> None:
        """Tell the router of blocks and steps from now on; all blocks first."""
        # The load of a step is told with its tokens.
        self._listener = news.listen(lambda: self.outbox.put_nowait(pb.DecodeEvent()), wants_load=False)

    def send_snapshot(self) -> None:
        """The router has missed something."""
        assert self._listener is not None
        self._listener.send_snapshot()

    async def next(self) -> pb.DecodeEvent | None:
        """What the stream says next."""
        event = await self.outbox.get()
        if event is not None and self._listener is not None and event.WhichOneof("event") is None:
            self._listener.put_into(event)
        return event

    def close(self) -> None:
        """The stream has ended."""
        if self._listener is not None:
            self._listener.close()


@dataclass(slots=True, eq=False)
class Live:
    """One request in this worker.

    Attributes:
        moments: when what happened to it.
        number: by which the router knows the request on its stream, 0 for none.
        remote: where its pages come from; None where it was always to be prefilled here.
        blocks: what the engine reserved: block ids, cached tokens, tokens of the prompt.
        cancelled: why the request is to end; the end is told once it is safe.
        prefill_instance: who shipped the pages, told with the first output.
        traceparent: the span of the router that it belongs to; empty: nobody traces it.
        untold: tokens that are still to be told with their phases, the first two.
        timer: gives the handover up at its deadline, all tries of prefill workers together.
    """

    key: Key
    session: Session
    remote: RemotePrefill | None
    handover_timeout_s: float
    moments: Moments
    number: int = 0
    blocks: tuple[list[int], int, int] | None = None
    cancelled: str = ""
    prefill_instance: str = ""
    traceparent: str = ""
    untold: int = 2
    timer: asyncio.TimerHandle | None = None

    def stop_timer(self) -> None:
        """The handover is decided; its deadline no longer matters."""
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None
