"""When things happened to one request in its decode worker, and the phases that follow from it. Pure.

All times are of this process's monotonic clock. A prefill worker tells how long ago it sampled the first token and how
long it had the prompt before that, which puts its work on the same scale, late by the message's way:

    submit ─┬── reserve ──┬───────────────── prefill here ──────────────────┬ attach ┬ told
            |             taken up                                   sampled |        |
            └ (reserve) ─┬─ prefill queue ─┬─ prefill ─┬ (reserve) ┬ transfer ┬ attach ┬ told
                         called            taken up    sampled     reserved   landed

Blocks are waited for while the prefill worker computes: only what of that wait was not covered counts as reserve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from baton.engine.request import Phases
from baton.engine.sequence import Key

__all__ = ["Moments", "StepTimes"]


@dataclass(frozen=True, slots=True)
class StepTimes:
    """When a step began and ended, and whose prompts it took up."""

    began_s: float
    ended_s: float
    taken_up: Sequence[Key] = ()


@dataclass(slots=True, eq=False)
class Moments:
    """What is known of one request. Whoever sets a time again means that it begins anew, as after a failed handover.

    Attributes:
        submitted_s: it came from the router.
        reserved_s: its blocks were reserved, for pages to come.
        taken_up_s: this worker's engine began with its prompt.
        sampled_s: the first token was sampled, here or by a prefill worker.
        landed_s: the pages that a prefill worker shipped had landed; None where there are none.
        prefill_queue_s, prefill_s: of that prefill worker: before it took the prompt up, and in all.
        first_told_s, second_s: the first token was told to the router, the second one was sampled.
    """

    submitted_s: float
    reserved_s: float | None = None
    taken_up_s: float | None = None
    sampled_s: float | None = None
    landed_s: float | None = None
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    first_told_s: float | None = None
    second_s: float | None = None

    def landed(self, now_s: float, *, sampled_s: float, prefill_s: float, queue_s: float) -> None:
        """Pages and first token of a prefill worker are here."""
        self.landed_s, self.sampled_s = now_s, sampled_s
        self.prefill_s, self.prefill_queue_s = prefill_s, min(queue_s, prefill_s)

    def first_told(self, now_s: float) -> Phases:
        """The phases until the first token, which sum to the time since the submit at most."""
        self.first_told_s = now_s
        begin_s = self.submitted_s
        if self.landed_s is None:
            taken_up_s = _within(begin_s, self.taken_up_s, now_s)
            sampled_s = _within(taken_up_s, self.sampled_s, now_s)
            return Phases(reserve_s=taken_up_s - begin_s, prefill_s=sampled_s - taken_up_s, attach_s=now_s - sampled_s)
        assert self.sampled_s is not None
        landed_s = _within(begin_s, self.landed_s, now_s)
        sampled_s = _within(begin_s, self.sampled_s, landed_s)
        called_s = _within(begin_s, self.sampled_s - self.prefill_s, sampled_s)
        taken_up_s = _within(called_s, self.sampled_s - self.prefill_s + self.prefill_queue_s, sampled_s)
        reserved_s = _within(begin_s, self.reserved_s, landed_s)
        return Phases(
            reserve_s=min(reserved_s, called_s) - begin_s + max(reserved_s - sampled_s, 0.0),
            prefill_queue_s=taken_up_s - called_s,
            prefill_s=sampled_s - taken_up_s,
            transfer_exposed_s=landed_s - max(sampled_s, reserved_s),
            attach_s=now_s - landed_s,
        )

    def second_sampled(self, now_s: float) -> Phases:
        """What is told with the second token."""
        assert self.first_told_s is not None
        self.second_s = now_s
        return Phases(first_step_s=max(now_s - self.first_told_s, 0.0))


def _within(low_s: float, time_s: float | None, high_s: float) -> float:
    """`time_s` between the two, the lower one where it is not known."""
    return low_s if time_s is None else min(max(low_s, time_s), high_s)
