"""The thread that owns an engine: takes commands between steps, steps while there is work, sleeps otherwise.

    commands (any thread) --queue--> [engine thread: run commands; step; deliver] --on_step--> (worker's event loop)

A step is told of when the next one is planned and about to be computed, or there is none: the event loop then has
Python for itself while this thread computes, and the two do not wait for each other between steps.

Commands are callables that get the engine; they run on the engine thread, so the engine needs no lock. Nothing on this
thread waits for a network: `on_step` and `on_layers` must only hand things over. An exception in a step is fatal for
the whole worker: `on_fatal` is told once, and the thread ends. While it has nothing to do others may borrow its cores.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from baton.clock import Clock
from baton.engine.engine import Engine, OnLayers, StepResult
from baton.errors import DeadlineError, UnavailableError
from baton.kernels import ops

__all__ = ["EngineLoop"]

_T = TypeVar("_T")
_IDLE_WAIT_S = 0.5
_log = logging.getLogger(__name__)


class EngineLoop:
    """Runs `engine` on its own thread.

    Args:
        on_step: called on the engine thread after each step that did anything, with the step's seconds.
        on_layers: see `Engine.step`.
        on_fatal: called once on the engine thread with the exception that ended it.
        on_begin: called on the engine thread as each step begins, as a part of it.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        clock: Clock,
        on_step: Callable[[StepResult, float], None],
        on_fatal: Callable[[BaseException], None],
        on_layers: OnLayers | None = None,
        on_begin: Callable[[], None] | None = None,
    ) -> None:
        self.engine = engine
        self._clock = clock
        self._on_step = on_step
        self._on_layers = on_layers
        self._on_fatal = on_fatal
        self._on_begin = on_begin
        self._commands: queue.SimpleQueue[Callable[[Engine], object]] = queue.SimpleQueue()
        self._stopping = threading.Event()
        self._result: tuple[StepResult, float] | None = None
        self._steps = 0
        self._began_s: float | None = None
        self._last_s: float | None = None
        self._thread = threading.Thread(target=self._main, name="baton-engine", daemon=True)

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def stop(self, timeout_s: float) -> None:
        """Ends the thread after the step in flight. Raises DeadlineError where that takes longer than `timeout_s`."""
        self._stopping.set()
        self._commands.put(lambda _: None)
        self._thread.join(timeout_s)
        if self._thread.is_alive():
            raise DeadlineError(f"the engine thread did not stop within {timeout_s} s: a step is still running")

    def progress(self) -> tuple[int, float | None, float | None]:
        """Steps begun so far; for how long the present one has run, None between steps; how long the last one took."""
        began_s = self._began_s
        return self._steps, None if began_s is None else self._clock.now_s() - began_s, self._last_s

    def submit(self, command: Callable[[Engine], object]) -> None:
        """Runs `command` on the engine thread before its next step."""
        self._commands.put(command)

    def call(self, command: Callable[[Engine], _T]) -> Future[_T]:
        """Like `submit`, with the result in a future; fails at once where the thread has ended."""
        future: Future[_T] = Future()

        def run(engine: Engine) -> None:
            try:
                future.set_result(command(engine))
            except Exception as error:  # the caller gets it
                future.set_exception(error)

        if self._stopping.is_set():
            future.set_exception(UnavailableError("the engine has stopped"))
        else:
            self._commands.put(run)
        return future

    def _main(self) -> None:
        try:
            while not self._stopping.is_set():
                self._run_commands(wait=not self.engine.has_work)
                if self.engine.has_work and not self._stopping.is_set():
                    ops.enter_cores()
                    begin_s = self._clock.now_s()
                    self._steps += 1
                    self._began_s = begin_s
                    if self._on_begin is not None:
                        self._on_begin()
                    result = self.engine.step(self._on_layers, self._deliver)
                    step_s = self._clock.now_s() - begin_s
                    self._began_s, self._last_s = None, step_s
                    result.began_s = begin_s
                    self._deliver()  # where nothing was computed
                    self._result = (result, step_s)
                    if not (self.engine.has_work and result.plan.rows):
                        self._deliver()
                    if not result.plan.rows and not result.plan.reserved:
                        # Waiting for blocks that a handover holds: a command will tell when they come back.
                        self._run_commands(wait=True)
        except BaseException as error:
            _log.exception("the engine failed; this worker ends")
            self._stopping.set()
            self._on_fatal(error)
        finally:
            ops.leave_cores()

    def _deliver(self) -> None:
        """Tells of the step before, if that has not been done."""
        if self._result is not None:
            (result, step_s), self._result = self._result, None
            self._on_step(result, step_s)

    def _run_commands(self, *, wait: bool) -> None:
        if wait:
            self._deliver()
            ops.leave_cores()
        try:
            command = self._commands.get(timeout=_IDLE_WAIT_S) if wait else self._commands.get_nowait()
            self._deliver()
            while True:
                command(self.engine)
                command = self._commands.get_nowait()
        except queue.Empty:
            return
