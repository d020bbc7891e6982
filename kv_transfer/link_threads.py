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

    def submit(self, job: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        """Run `job` on a thread, then `done` on the loop's thread, once, with its result or its error.

        When the loop is closed before, nobody is told.
        """
        self.executor.submit(self._run, job, done)

    def close(self) -> None:
        """Take no more jobs; those that were submitted end by themselves."""
        self.executor.shutdown(wait=False)

    def _run(self, job: Callable[[], T], done: Callable[[T | None, BaseException | None], None]) -> None:
        result: T | None = None
        failure: BaseException | None = None
        try:
            result = job()
        except BaseException as error:
            failure = error
        with contextlib.suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(done, result, failure)
        os.sched_yield()
