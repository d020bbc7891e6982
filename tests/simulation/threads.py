"""Cooperative threads on virtual time, with the parts of `threading` and `queue` that the product uses.

A simulated thread is carried by a real one, but exactly one of all of them, or the simulation itself, runs at any
moment: control is handed over where a thread waits or sleeps, and nowhere else. So the product's own engine loop, link
threads and lane readers run unchanged, and yet the order of everything is the event heap's.

    simulation --resume--> thread ... parks (waits for something, or for a time) --back--> simulation
"""

from __future__ import annotations

import _thread
import queue
from collections import deque
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.process import Process

__all__ = ["QUEUE", "THREADING", "Thread", "current_thread", "end_thread", "sleep", "use_processes"]

_WAKE_S = 15e-6

_back = _thread.allocate_lock()
_back.acquire()
_idle: list[_Carrier] = []
_running: list[Thread] = []
_current_process: Callable[[], Process] | None = None


def use_processes(current: Callable[[], Process]) -> None:
    """Say whose thread a new one is."""
    global _current_process
    _current_process = current


def current_thread() -> Thread | None:
    """The simulated thread that runs, None in the simulation itself."""
    return _running[-1] if _running else None


class _Carrier:
    """A real thread that carries simulated ones, one after the other."""

    def __init__(self) -> None:
        self.go = _thread.allocate_lock()
        self.go.acquire()
        self.work: Callable[[], None] | None = None
        _thread.start_new_thread(self._carry, ())

    def _carry(self) -> None:
        while True:
            self.go.acquire()
            assert self.work is not None
            self.work()
            self.work = None
            _idle.append(self)
            _back.release()


class Thread:
    """`threading.Thread`."""

    def __init__(
        self,
        group: None = None,
        target: Callable[..., object] | None = None,
        name: str = "",
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
        *,
        daemon: bool | None = None,
    ) -> None:
        assert _current_process is not None
        assert target is not None
        self.process = _current_process()
        self.name = name
        self._call = lambda: target(*args, **(kwargs or {}))
        self._carrier: _Carrier | None = None
        self._parked = 0
        self._is_parked = False
        self._woken = False
        self._ended = False
        self._joiners: list[Thread] = []
        self.is_killed = False

    def start(self) -> None:
        """Runs soon."""
        if self.process.is_dead:
            self._ended = True
            return
        self.process.threads.append(self)
        self.process.world.after(_WAKE_S, self._begin)

    def is_alive(self) -> bool:
        """Whether it has not ended."""
        return not self._ended

    def join(self, timeout: float | None = None) -> None:
        """Waits for its end, on a simulated thread."""
        me = current_thread()
        assert me is not None, "only threads may wait"
        if not self._ended:
            self._joiners.append(me)
            me.park(timeout)

    # ---------------------------------------------------------------- switching

    def _begin(self) -> None:
        self.process.when_running(self._start_on_carrier)

    def _start_on_carrier(self) -> None:
        if self.is_killed:
            return
        self._carrier = _idle.pop() if _idle else _Carrier()
        self._carrier.work = self._main
        self._switch_in()

    def _main(self) -> None:
        from tests.simulation.process import Killed

        try:
            self._call()
        except Killed:
            pass
        except BaseException as error:
            if not self.process.is_dead:
                self.process.world.fail("no stray exception", f"on thread {self.name}: {type(error).__name__}: {error}")
        finally:
            self._ended = True
            if self in self.process.threads:
                self.process.threads.remove(self)
            for joiner in self._joiners:
                joiner.unpark()

    def _switch_in(self) -> None:
        assert self._carrier is not None
        world = self.process.world
        before, world.current = world.current, self.process
        _running.append(self)
        self._carrier.go.release()
        _back.acquire()
        _running.pop()
        world.current = before

    def park(self, timeout: float | None = None) -> bool:
        """Waits, on this thread itself, for `unpark`; False where the time came first. None: without limit."""
        from tests.simulation.process import Killed

        if self.is_killed:
            raise Killed
        assert self._carrier is not None
        self._parked += 1
        ticket = self._parked
        self._woken, self._is_parked = False, True
        if timeout is not None:
            self.process.world.after(timeout, lambda: self._resume(ticket, woken=False))
        _back.release()
        self._carrier.go.acquire()
        if self.is_killed:
            raise Killed
        return self._woken

    def unpark(self) -> None:
        """Ends its wait."""
        ticket = self._parked
        if self._is_parked and not self.process.is_dead:
            self.process.world.after(_WAKE_S, lambda: self._resume(ticket, woken=True))

    def _resume(self, ticket: int, *, woken: bool) -> None:
        def resume() -> None:
            if ticket == self._parked and self._is_parked and not self.is_killed:
                self._is_parked, self._woken = False, woken
                self._switch_in()

        if ticket == self._parked and self._is_parked:
            self.process.when_running(resume)


def end_thread(thread: Thread) -> None:
    """Unwinds a thread of a process that has died."""
    thread.is_killed = True
    if thread._carrier is not None and not thread._ended:
        thread._is_parked = False
        thread._switch_in()


def sleep(seconds: float) -> None:
    """Virtual time passes for the simulated thread that calls."""
    thread = current_thread()
    assert thread is not None, "only threads may sleep"
    thread.park(seconds)


class _Event:
    def __init__(self) -> None:
        self._is_set = False

    def is_set(self) -> bool:
        return self._is_set

    def set(self) -> None:
        self._is_set = True


class _Condition:
    def __init__(self) -> None:
        self._waiting: list[Thread] = []

    def __enter__(self) -> _Condition:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def wait(self, timeout: float | None = None) -> bool:
        thread = current_thread()
        assert thread is not None, "only threads may wait"
        self._waiting.append(thread)
        try:
            return thread.park(timeout)
        finally:
            if thread in self._waiting:
                self._waiting.remove(thread)

    def notify_all(self) -> None:
        waiting, self._waiting = self._waiting, []
        for thread in waiting:
            thread.unpark()


class _Lock:
    """Nothing is interrupted while it holds a lock, unless it parks; nobody may."""

    def __enter__(self) -> None:
        return None

    def __exit__(self, *_: object) -> None:
        return None


class _SimpleQueue:
    def __init__(self) -> None:
        self._items: deque[Any] = deque()
        self._waiting: deque[Thread] = deque()

    def put(self, item: Any) -> None:
        self._items.append(item)
        if self._waiting:
            self._waiting.popleft().unpark()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        thread = current_thread()
        assert thread is not None, "only threads may wait"
        while not self._items:
            self._waiting.append(thread)
            if not thread.park(timeout):
                if thread in self._waiting:
                    self._waiting.remove(thread)
                if not self._items:
                    raise queue.Empty
        return self._items.popleft()

    def get_nowait(self) -> Any:
        if not self._items:
            raise queue.Empty
        return self._items.popleft()


THREADING = SimpleNamespace(Thread=Thread, Event=_Event, Condition=_Condition, Lock=_Lock)
"""Stands in for `threading`."""

QUEUE = SimpleNamespace(SimpleQueue=_SimpleQueue, Empty=queue.Empty)
"""Stands in for `queue`."""
