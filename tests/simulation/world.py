"""Virtual time: one heap of events for all simulated processes, one seed, one trace. See `README.md`.

    world.at(t, call) --heap--> world.run(): pop the earliest event, jump there, call it, until told to stop

Nothing here waits: an event that is due next is simply next. Ties are broken by the order in which events were made.
All chance comes from `world.random(name)`: a generator of its own per name, so that one part of the simulation that
draws once more does not change what the others draw.
"""

from __future__ import annotations

import heapq
import random
import zlib
from collections import deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tests.simulation.process import Process

__all__ = ["Violation", "World"]

_KEPT_LINES = 400


class Violation(Exception):
    """A checker's finding: what was promised and is not so.

    Attributes:
        checker: name of the promise.
    """

    def __init__(self, checker: str, text: str) -> None:
        super().__init__(f"{checker}: {text}")
        self.checker = checker


class World:
    """Time, chance and the trace of one simulated run.

    Args:
        seed: decides everything.
        keep_trace: keep every line, not only the last ones.

    Attributes:
        now_s: virtual time.
        current: the process whose code runs, None between events.
        problems: what went wrong without anybody to raise to; the run ends with the first.
        lanes: of all processes; the place in the list is the descriptor.
        trace_hash: over all lines so far.
    """

    def __init__(self, seed: int, *, keep_trace: bool = False) -> None:
        self.seed = seed
        self.now_s = 0.0
        self.current: Process | None = None
        self.problems: list[Violation] = []
        self.trace_hash = 0
        self.lines: deque[tuple[float, str, str]] = deque(maxlen=None if keep_trace else _KEPT_LINES)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._num_made = 0
        self.num_events = 0
        self.lanes: list[Any] = []

    def random(self, name: str) -> random.Random:
        """A generator that depends on the seed and `name` alone."""
        return random.Random(f"{self.seed}/{name}")

    def at(self, time_s: float, call: Callable[[], None]) -> None:
        """Call something at a virtual time."""
        self._num_made += 1
        heapq.heappush(self._heap, (max(time_s, self.now_s), self._num_made, call))

    def after(self, delay_s: float, call: Callable[[], None]) -> None:
        """Call something in a while."""
        self._num_made += 1
        heapq.heappush(self._heap, (self.now_s + delay_s, self._num_made, call))

    def run(self, until_s: float, is_over: Callable[[], bool] = lambda: False) -> None:
        """Let time pass until `until_s`, or `is_over`, or a problem, whatever comes first."""
        heap = self._heap
        while heap and heap[0][0] <= until_s and not self.problems and not is_over():
            self.now_s, _, call = heapq.heappop(heap)
            self.num_events += 1
            call()
        if not self.problems and not is_over():
            self.now_s = until_s
        if self.problems:
            raise self.problems[0]

    def log(self, what: str, who: str | None = None, *, is_detail: bool = False) -> None:
        """A line of the trace; details are kept only where all is."""
        if who is None:
            who = "-" if self.current is None else self.current.name
        self.trace_hash = zlib.crc32(f"{self.now_s:.9f} {who} {what}".encode(), self.trace_hash)
        if not is_detail or self.lines.maxlen is None:
            self.lines.append((self.now_s, who, what))

    def fail(self, checker: str, text: str) -> None:
        """A promise is broken."""
        self.log(f"VIOLATION {checker}: {text}")
        self.problems.append(Violation(checker, text))

    def transcript(self, last: int | None = None) -> str:
        """The trace for people."""
        lines = list(self.lines)[-last:] if last else list(self.lines)
        return "\n".join(f"{time_s:10.6f}  {who:<14} {what}" for time_s, who, what in lines)
