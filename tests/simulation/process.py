"""A simulated process: an event loop of its own on virtual time, its threads, and the ways it can end or stop.

    running <--resume-- paused (SIGSTOP: callbacks, timers and threads wait; the kernel still takes in what is sent)
       |  kill
       v
     dead    nothing of it runs any more, what its leftovers ask for goes nowhere, its connections break

The loop is asyncio's interface over `World`: callbacks run in turns as `BaseEventLoop` runs them, first come, first
served; a turn comes some microseconds after it was asked for, different ones in different processes, which is what
interleaves them. Each process has its own monotonic clock, with an offset of its own.
"""

from __future__ import annotations

import asyncio
import sys
from asyncio import events
from collections import deque
from collections.abc import Callable
from contextvars import Context
from typing import Any

from tests.simulation.threads import Thread, end_thread
from tests.simulation.world import World

__all__ = ["Killed", "Process", "ProcessLoop"]

_TURN_S = 20e-6


class Killed(BaseException):
    """Unwinds code of a process that has died."""


class Process:
    """One process.

    Args:
        name: the instance's.

    Attributes:
        loop: its event loop.
        threads: those that have not ended.
        exit_text: how it ended.
        on_death: called once when it dies, for what the system closes then.
        main, stop: its main function's task, and what SIGTERM sets.
        slowness: how many times longer than usual its computations take.
    """

    def __init__(self, world: World, name: str) -> None:
        self.world = world
        self.name = name
        self.is_dead = False
        self.is_paused = False
        self.exit_text = ""
        self.slowness = 1.0
        self.on_death: list[Callable[[], None]] = []
        self.threads: list[Thread] = []
        self.main: asyncio.Task[Any] | None = None
        self.stop: asyncio.Event | None = None
        self.random = world.random(f"process {name} {world.now_s:.6f}")
        self.loop = ProcessLoop(self)
        self._waiting: list[Callable[[], None]] = []

    @property
    def is_running(self) -> bool:
        """Neither dead nor paused."""
        return not (self.is_dead or self.is_paused)

    def when_running(self, call: Callable[[], None]) -> None:
        """Now, or when it is resumed, or never."""
        if self.is_dead:
            return
        if self.is_paused:
            self._waiting.append(call)
        else:
            call()

    def pause(self) -> None:
        """SIGSTOP."""
        if not self.is_dead:
            self.is_paused = True

    def resume(self) -> None:
        """SIGCONT."""
        if self.is_dead or not self.is_paused:
            return
        self.is_paused = False
        waiting, self._waiting = self._waiting, []
        for call in waiting:
            self.world.after(self.random.random() * 1e-4, lambda call=call: self.when_running(call))  # type: ignore[misc]

    def kill(self, why: str) -> None:
        """SIGKILL, or the end of the main function."""
        if self.is_dead:
            return
        if why:
            self.world.log(f"process ends: {why}", self.name)
        self.is_dead = True
        self.exit_text = why
        self._waiting.clear()
        self.loop.drop()
        # Not from within one of its own threads.
        self.world.after(0.0, self.end_threads)
        for call in self.on_death:
            call()

    def end_threads(self) -> None:
        """Unwinds the threads of a dead process."""
        for thread in list(self.threads):
            end_thread(thread)


class ProcessLoop(asyncio.AbstractEventLoop):
    """asyncio's event loop of one process."""

    def __init__(self, process: Process) -> None:
        self.process = process
        self.world = process.world
        self.offset_s = process.random.uniform(10.0, 10_000.0)
        self._ready: deque[asyncio.Handle] = deque()
        self._turn_due = False
        self._readers: dict[int, Callable[[], None]] = {}

    # ---------------------------------------------------------------- time and callbacks

    def time(self) -> float:
        """The process's monotonic clock."""
        return self.world.now_s + self.offset_s

    def call_soon(self, callback: Callable[..., object], *args: Any, context: Context | None = None) -> asyncio.Handle:
        """See asyncio."""
        handle = events.Handle(callback, args, self, context)
        if not self.process.is_dead:
            self._ready.append(handle)
            self._ask_for_turn()
        return handle

    call_soon_threadsafe = call_soon

    def call_later(
        self, delay: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        return self.call_at(self.time() + delay, callback, *args, context=context)

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        """See asyncio."""
        timer = events.TimerHandle(when, callback, args, self, context)
        if not self.process.is_dead:
            self.world.at(when - self.offset_s, lambda: self._due(timer))
        return timer

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """Asyncio tells of a cancelled timer; it is skipped when its time comes."""

    def _due(self, timer: asyncio.TimerHandle) -> None:
        if not timer.cancelled() and not self.process.is_dead:
            self._ready.append(timer)
            self._ask_for_turn()

    def _ask_for_turn(self) -> None:
        if not self._turn_due:
            self._turn_due = True
            self.world.after(_TURN_S * (0.5 + self.process.random.random()), self._take_turn)

    def _take_turn(self) -> None:
        self.process.when_running(self._turn)

    def _turn(self) -> None:
        world, ready = self.world, self._ready
        world.current = self.process
        events._set_running_loop(self)
        sys.set_asyncgen_hooks(None, self._finalize)
        try:
            for _ in range(len(ready)):
                handle = ready.popleft()
                if not handle.cancelled():
                    handle._run()
                if self.process.is_dead:
                    return
        finally:
            events._set_running_loop(None)
            world.current = None
            self._turn_due = False
        if ready:
            self._ask_for_turn()

    def _finalize(self, generator: Any) -> None:
        """An asynchronous generator was dropped before its end."""
        if not self.process.is_dead:
            self.call_soon(self.create_task, generator.aclose())

    def drop(self) -> None:
        """The process has died."""
        self._ready.clear()
        self._readers.clear()

    # ---------------------------------------------------------------- futures, tasks, threads

    def create_future(self) -> asyncio.Future[Any]:
        """See asyncio."""
        return asyncio.Future(loop=self)

    def create_task(self, coro: Any, *, name: str | None = None, context: Context | None = None) -> asyncio.Task[Any]:
        """See asyncio."""
        return asyncio.Task(coro, loop=self, name=name, context=context)

    def run_in_executor(self, executor: Any, func: Callable[..., Any], *args: Any) -> asyncio.Future[Any]:
        """Runs `func` on a simulated thread."""
        assert executor is None
        future = self.create_future()

        def settle(result: Any, error: BaseException | None) -> None:
            if future.done():
                return
            if error is None:
                future.set_result(result)
            else:
                future.set_exception(error)

        def main() -> None:
            try:
                result = func(*args)
            except Exception as error:
                self.call_soon(settle, None, error)
            else:
                self.call_soon(settle, result, None)

        Thread(target=main, name="executor").start()
        return future

    def add_reader(self, fd: Any, callback: Callable[..., object], *args: Any) -> None:
        """For lanes: calls back while one has something to read."""
        number = _descriptor(fd)
        lane = self.world.lanes[number]

        def look() -> None:
            if number in self._readers and lane.is_readable:
                callback(*args)
                if number in self._readers and lane.is_readable:
                    self.call_soon(look)

        self._readers[number] = look
        lane.on_readable = lambda: self.call_soon(look)
        if lane.is_readable:
            self.call_soon(look)

    def remove_reader(self, fd: Any) -> bool:
        """See asyncio."""
        return self._readers.pop(_descriptor(fd), None) is not None

    # ---------------------------------------------------------------- the rest

    def get_debug(self) -> bool:
        """See asyncio."""
        return False

    def is_running(self) -> bool:
        """See asyncio."""
        return True

    def is_closed(self) -> bool:
        """See asyncio."""
        return False

    def call_exception_handler(self, context: dict[str, Any]) -> None:
        """An exception that nobody takes is a bug."""
        error = context.get("exception")
        if self.process.is_dead or isinstance(error, Killed):
            return
        text = f"{context.get('message')}: {type(error).__name__}: {error}"
        self.world.fail("no stray exception", f"in {self.process.name}: {text}{_place(error)}")


def _descriptor(fd: Any) -> int:
    return fd if isinstance(fd, int) else int(fd.fileno())


def _place(error: BaseException | None) -> str:
    """Where it was raised."""
    trace = None if error is None else error.__traceback__
    if trace is None:
        return ""
    while trace.tb_next is not None:
        trace = trace.tb_next
    return f" ({trace.tb_frame.f_code.co_filename}:{trace.tb_lineno})"
