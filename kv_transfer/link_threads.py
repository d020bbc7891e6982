"""The threads of a link: jobs that copy payloads, whose ends are told on the event loop's thread.

Jobs of a link are short and many, and the loop has something to do behind those that tell it: ack what was fetched. A
thread that took its next job at once would keep the core that they share for milliseconds, and the other side of the
link idle meanwhile; so a thread steps back after each of these.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import queue
import threading
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from baton.errors import HandoverError

__all__ = ["LinkThreads"]

_NUM_THREADS = 2

T = TypeVar("T")


class LinkThreads:
    """Two threads of one link: one copies while the other waits. Made on the event loop's thread, ended by `close`.

    Args:
        name: prefix of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self._name = name
        self._is_closed = False
        self._num_started = 0
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()

    def submit(
        self, job: Callable[[], T], done: Callable[[T], None] | None, failed: Callable[[BaseException], None]
    ) -> None:
        """Run `job` on a thread, then either `done` with its result or `failed` with its error on the loop's thread.

        Without a `done` the loop is left alone when all went well. When the loop is closed before, nobody is told. On
        the loop's thread.
        """
        if self._is_closed:
            self._loop.call_soon(failed, HandoverError("the link is closed"))
            return
        if self._num_started < _NUM_THREADS:
            name = f"{self._name}_{self._num_started}"
            threading.Thread(target=self._work, name=name, daemon=True).start()
            self._num_started += 1
        self._jobs.put(partial(self._run, job, done, failed))

    def call(self, job: Callable[[], T]) -> asyncio.Future[T]:
        """The result of a job, for those who await it."""
        future: asyncio.Future[T] = self._loop.create_future()

        def done(result: T) -> None:
            if not future.cancelled():
                future.set_result(result)

        def failed(error: BaseException) -> None:
            if not future.cancelled():
                future.set_exception(error)

        self.submit(job, done, failed)
        return future

    def close(self) -> None:
        """Take no more jobs; those that were submitted end by themselves. Idempotent."""
        if self._is_closed:
            return
        self._is_closed = True
        for _ in range(self._num_started):
            self._jobs.put(None)

    def _work(self) -> None:
        while (run := self._jobs.get()) is not None:
            run()
            # What the job holds (a payload, a pool) must not live until the next one comes.
            del run

    def _run(
        self, job: Callable[[], T], done: Callable[[T], None] | None, failed: Callable[[BaseException], None]
    ) -> None:
        try:
            result = job()
        except BaseException as error:
            self._tell(partial(failed, error))
        else:
            if done is not None:
                self._tell(partial(done, result))

    def _tell(self, event: Callable[[], None]) -> None:
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(event)
        os.sched_yield()
