"""Work on threads that must not keep a process alive: a rank that has failed ends although a wait still runs."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["run_in_daemon"]

_T = TypeVar("_T")


def run_in_daemon(name: str, work: Callable[[], _T]) -> asyncio.Future[_T]:
    """Runs `work` on a daemon thread of its own; its result or exception comes in the future, on the event loop.

    Unlike with an executor, nobody waits for the thread when the interpreter ends.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[_T] = loop.create_future()

    def settle(result: _T | None, error: BaseException | None) -> None:
        if future.done():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(result)  # type: ignore[arg-type]

    def main() -> None:
        result: _T | None = None
        failure: BaseException | None = None
        try:
            result = work()
        except BaseException as error:
            failure = error
        # The loop may have closed meanwhile: then nobody waits for this.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(settle, result, failure)

    threading.Thread(target=main, name=name, daemon=True).start()
    return future
