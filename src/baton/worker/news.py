"""What a worker tells every router that listens, besides tokens: blocks that came and went, step samples, its load.

    [engine thread]  journal fills as blocks are named and evicted; add_steps(samples)
    [event loop]     touch() after each step or release --at most every PERIOD_S--> the engine's thread hands the
                     journal over between two steps --> log --> every listener is called, and reads when it can

A listener is one router's stream. It takes its share in bounded pieces, between whatever else its stream has to say;
see `block_log.py` for who reads too slowly. Of an instance of several ranks only the driver has news: all ranks hold
the same blocks.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from baton.engine.block_journal import BlockChange
from baton.engine.engine import Engine
from baton.engine.loop import EngineLoop
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.block_log import BlockLog, BlockReader

__all__ = ["PERIOD_S", "Listener", "News"]

PERIOD_S = 0.05
_MAX_STEPS = 256
"""Step samples that wait for one listener; older ones are dropped: they are samples."""
_MAX_PIECE_KEYS = 1024
"""In one message: what a router takes in within a millisecond or two."""


class Listener:
    """One router's share of the news. Lives on the event loop.

    Args:
        on_news: called when there is something to `put_into` a message, once until it is.
        wants_load: whether a change of the load alone is news.
    """

    def __init__(self, news: News, on_news: Callable[[], None], *, wants_load: bool) -> None:
        self._news = news
        self._on_news = on_news
        self._wants_load = wants_load
        self._blocks = BlockReader(news.log)
        self._steps: deque[pb.StepSample] = deque(maxlen=_MAX_STEPS)
        self._is_called = False

    def put_into(self, message: pb.DecodeEvent | pb.WorkerNews) -> None:
        """Fill in the next piece, and the load of this moment; where there is more, `on_news` is called again."""
        self._is_called = False
        message.load.CopyFrom(self._news.load())
        message.steps.extend(self._steps)
        self._steps.clear()
        num_keys = 0
        while num_keys < _MAX_PIECE_KEYS and (batch := self._blocks.next()) is not None:
            message.blocks.append(batch)
            num_keys += len(batch.stored) + len(batch.removed) + 1
        if self._blocks.has_more:
            self._call()

    def send_snapshot(self) -> None:
        """The router has missed something: all blocks again."""
        self._blocks.restart()
        self._call()

    def close(self) -> None:
        """The stream has ended."""
        self._news.forget(self)

    def tell(self, steps: Sequence[pb.StepSample]) -> None:
        """Something may be new, these samples among it."""
        self._steps.extend(steps)
        if self._wants_load or self._steps or self._blocks.has_more:
            self._call()

    def wake(self) -> None:
        """Have the stream look, whatever there is."""
        self._on_news()

    def _call(self) -> None:
        if not self._is_called:
            self._is_called = True
            self.wake()


class News:
    """The news of one instance.

    Args:
        load: the instance's load of this moment.

    Attributes:
        log: of its blocks.
    """

    def __init__(self, load: Callable[[], pb.WorkerLoad]) -> None:
        self.load = load
        self.log = BlockLog()
        self._loop = asyncio.get_running_loop()
        self._engine_loop: EngineLoop | None = None
        self._listeners: set[Listener] = set()
        self._steps: deque[pb.StepSample] = deque(maxlen=_MAX_STEPS)
        self._told_s = -PERIOD_S
        self._timer: asyncio.TimerHandle | None = None
        self._is_closed = False

    def watch(self, engine_loop: EngineLoop) -> None:
        """Tell of this engine's blocks from now on."""
        self._engine_loop = engine_loop

    def add_steps(self, samples: Sequence[pb.StepSample]) -> None:
        """Notes what steps did and took; from any thread. They leave with the next `touch`."""
        self._steps.extend(samples)

    def touch(self) -> None:
        """Blocks, load or steps may have changed. Call it on the event loop."""
        if self._timer is None and self._engine_loop is not None and not self._is_closed:
            self._timer = self._loop.call_at(max(self._told_s + PERIOD_S, self._loop.time()), self._collect)

    def listen(self, on_news: Callable[[], None], *, wants_load: bool) -> Listener:
        """A new stream, which begins with a snapshot of all blocks."""
        listener = Listener(self, on_news, wants_load=wants_load)
        self._listeners.add(listener)
        listener.tell(())
        return listener

    def forget(self, listener: Listener) -> None:
        """Its stream has ended."""
        self._listeners.discard(listener)

    def close(self) -> None:
        """End every `follow`."""
        self._is_closed = True
        if self._timer is not None:
            self._timer.cancel()
        for listener in self._listeners:
            listener.wake()

    async def follow(self, incarnation: bytes, *, beat_s: float) -> AsyncIterator[pb.WorkerNews]:
        """One router's stream of all news, at least one message every `beat_s`, until `close`."""
        is_new = asyncio.Event()
        listener = self.listen(is_new.set, wants_load=True)
        try:
            first = True
            while not self._is_closed:
                try:
                    async with asyncio.timeout(beat_s):
                        await is_new.wait()
                except TimeoutError:
                    yield pb.WorkerNews(load=self.load())  # says that this process lives
                    continue
                if self._is_closed:
                    return
                is_new.clear()
                message = pb.WorkerNews(incarnation=incarnation if first else b"")
                listener.put_into(message)
                first = False
                yield message
        finally:
            listener.close()

    def _collect(self) -> None:
        assert self._engine_loop is not None
        journal = self._engine_loop.engine.pool.journal
        if not journal:
            self._tell(BlockChange([], []))
            return

        def hand_over(engine: Engine) -> None:
            self._loop.call_soon_threadsafe(self._tell, engine.pool.journal.take())

        self._engine_loop.submit(hand_over)

    def _tell(self, change: BlockChange) -> None:
        self._timer, self._told_s = None, self._loop.time()
        self.log.append(change)
        steps = []
        while self._steps:
            steps.append(self._steps.popleft())
        for listener in list(self._listeners):
            listener.tell(steps)
