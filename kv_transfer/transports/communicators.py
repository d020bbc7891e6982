"""The NCCL communicators of a process: made one after the other, ended without waiting, counted.

A communicator costs tens of MB of GPU memory, bursts of creations are known to hang, and so is its abort. Hence:

    create   one at a time and not more often than every `spacing_s`; on a thread of its own, with a deadline
    end      abort on a thread of its own, which nobody waits for; what the communicator may still touch is kept
             until the abort has returned, so a hung one costs memory and is never used again
    limit    live ones, those being aborted and those stuck in creation count together

Halves that send and halves that receive take turns among themselves: the two of one link must meet. Processes may still
wait for each other in a ring, so a turn is only waited for as long as `patience_s`: bursts are what must not happen.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.errors import DeadlineError, HandoverError

__all__ = ["Communicator", "Communicators"]

_log = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Communicator:
    """A process group of two ranks.

    Attributes:
        rank: 0 sends, 1 receives.
        group: None while it is being made, and when it is gone.
        is_late: its creation passed the deadline; nobody wants it any more.
        ending_s: since when it is being aborted.
        keeps: what it may touch until then.
    """

    peer: str
    rank: int
    group: Any = None
    is_late: bool = False
    ending_s: float | None = None
    keeps: list[object] = field(default_factory=list)


class Communicators:
    """Thread-safe.

    Args:
        max_open: communicators at a time, hung ones included.
        spacing_s: from the start of one creation to the next of the same rank.
        patience_s: how long one creation waits for another of the same rank to end.
        abort_timeout_s: after which an abort counts as hung.
    """

    def __init__(
        self, *, max_open: int = 64, spacing_s: float = 0.05, patience_s: float = 1.0, abort_timeout_s: float = 5.0
    ) -> None:
        self._max_open = max_open
        self._spacing_s = spacing_s
        self._patience_s = patience_s
        self._abort_timeout_s = abort_timeout_s
        self._changed = threading.Condition()
        self._creating: set[Communicator] = set()
        self._next_start_s = {0: float("-inf"), 1: float("-inf")}
        self._open: set[Communicator] = set()

    @property
    def num_open(self) -> int:
        """All that hold memory of the GPU, or are about to; leaked ones included."""
        with self._changed:
            return len(self._open)

    @property
    def num_leaked(self) -> int:
        """Those whose creation or abort hangs."""
        now_s = time.monotonic()
        with self._changed:
            return sum(
                entry.is_late if entry.ending_s is None else now_s - entry.ending_s > self._abort_timeout_s
                for entry in self._open
            )

    def check_room(self, peer: str) -> None:
        """Raises HandoverError when the limit is reached."""
        with self._changed:
            if len(self._open) >= self._max_open:
                raise HandoverError(
                    f"no communicator for {peer}: {self._max_open} are open, which is the limit, "
                    f"{self.num_leaked} of them hang"
                )

    def create(
        self, make: Callable[[], Any], try_out: Callable[[Any], None], *, peer: str, rank: int, deadline_s: float
    ) -> Communicator:
        """Have `make` make a process group, and `try_out` see whether it works, on another thread.

        Raises:
            HandoverError: one of the two failed, or the limit is reached.
            DeadlineError: they had not ended after `deadline_s` seconds; should they ever, the group is aborted.
        """
        end_s = time.monotonic() + deadline_s
        entry = self._take_turn(peer, rank, end_s, deadline_s)
        errors: list[BaseException] = []

        def run() -> None:
            try:
                entry.group = make()
                try_out(entry.group)
            except BaseException as error:
                errors.append(error)
            with self._changed:
                self._creating.discard(entry)
                self._changed.notify_all()
                if entry.group is None:
                    self._open.discard(entry)
                elif errors or entry.is_late:
                    self.end(entry)

        thread = threading.Thread(target=run, name="baton-nccl-create", daemon=True)
        thread.start()
        thread.join(max(0.0, end_s - time.monotonic()))
        with self._changed:
            if entry in self._creating:
                entry.is_late = True
                self._changed.notify_all()
                raise DeadlineError(f"no communicator with {peer} within {deadline_s:g} s")
        if errors:
            if isinstance(errors[0], (HandoverError, DeadlineError)):
                raise errors[0]
            raise HandoverError(f"no communicator with {peer}: {_first_line(errors[0])}") from errors[0]
        return entry

    def _take_turn(self, peer: str, rank: int, end_s: float, deadline_s: float) -> Communicator:
        patient_until_s = min(time.monotonic() + self._patience_s, end_s)
        with self._changed:
            while not all(entry.is_late or entry.rank != rank for entry in self._creating):
                left_s = patient_until_s - time.monotonic()
                if left_s <= 0:
                    break
                self._changed.wait(left_s)
            self.check_room(peer)
            start_s = max(time.monotonic(), self._next_start_s[rank])
            if start_s >= end_s:
                raise DeadlineError(f"no communicator with {peer} within {deadline_s:g} s: others are being made")
            self._next_start_s[rank] = start_s + self._spacing_s
            entry = Communicator(peer, rank)
            self._open.add(entry)
            self._creating.add(entry)
        time.sleep(max(0.0, start_s - time.monotonic()))
        return entry

    def end(self, communicator: Communicator, *keep: object) -> None:
        """Abort a communicator; returns at once. Idempotent.

        Args:
            keep: what it may touch until the abort has returned.
        """
        with self._changed:
            if communicator not in self._open or communicator.ending_s is not None:
                return
            communicator.ending_s = time.monotonic()
            communicator.keeps.extend(keep)

        group = communicator.group

        def run() -> None:
            assert communicator.ending_s is not None
            try:
                group.abort()
            except Exception as error:
                _log.warning("aborting the communicator with %s failed: %s", communicator.peer, _first_line(error))
            took_s = time.monotonic() - communicator.ending_s
            if took_s > self._abort_timeout_s:
                _log.error("aborting the communicator with %s took %.1f s", communicator.peer, took_s)
            with self._changed:
                self._open.discard(communicator)
                communicator.group = None
                communicator.keeps.clear()

        threading.Thread(target=run, name="baton-nccl-abort", daemon=True).start()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
