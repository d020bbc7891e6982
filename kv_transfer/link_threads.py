"""The threads of a link: jobs that copy payloads, whose ends are told on the event loop's thread.

Jobs of a link are short and many, and the loop has something to do behind each of them: post what was staged, ack what
was fetched. A thread that took its next job at once would keep the core that they share for milliseconds, and the other
side of the link idle meanwhile; so a thread steps back after each job.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import TypeVar

__all__ = ["LinkThreads"]

_NUM_THREADS = 2

T = TypeVar("T")


class LinkThreads:
    """Two threads of one link: one copies while the other waits. Made on the event loop's thread.

    Args:
        name: prefix of the threads' names.
    """

    def __init__(self, name: str) -> None:
        self._loop = asyncio.get_running_loop()
        self.executor = ThreadPoolExecutor(_NUM_THREADS, thread_name_prefix=name)

    def submit(
        self, job: Callable[[], T], done: Callable[[T], None] | None, failed: Callable[[BaseException], None]
    ) -> None:
        """Run `job` on a thread, then either `done` with its result or `failed` with its error on the loop's thread.

        Without a `done` the loop is left alone when all went well. When the loop is closed before, nobody is told.
        """
        self.executor.submit(self._run, job, done, failed)

    def close(self) -> None:
        """Take no more jobs; those that were submitted end by themselves."""
        self.executor.shutdown(wait=False)

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
