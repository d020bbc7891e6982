"""What is sent and when: a row of jobs, made from the load's description. Pure; a seed gives the same jobs again.

    Job     one client's business: a request, or the turns of a conversation, from a time on
    Turn    what is said anew, how long the answer shall be, how long its client thinks before

Arrivals, lengths, classes and conversations draw from generators of their own, so that changing one leaves the others.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import repeat

from baton.cluster.loadgen.arrivals import ArrivalProcess, times_s
from baton.cluster.loadgen.lengths import Lengths
from baton.cluster.loadgen.load_class import DEFAULT_CLASS, LoadClass, draw_class
from baton.cluster.loadgen.prompts import Segment, cut
from baton.cluster.loadgen.sessions import SessionShape
from baton.cluster.loadgen.trace import TraceRow, rescale, segments_of

__all__ = ["Job", "Turn", "Workload"]


@dataclass(frozen=True, slots=True)
class Turn:
    """`segments` are what this turn adds to the conversation; `was_cut` says that the model's window shortened it."""

    segments: tuple[Segment, ...]
    output_tokens: int
    think_s: float = 0.0
    was_cut: bool = False


@dataclass(frozen=True, slots=True)
class Job:
    """`start_s` since the begin; None starts when a client of the closed loop is free."""

    index: int
    start_s: float | None
    load_class: LoadClass
    turns: tuple[Turn, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """The description.

    Attributes:
        requests: the most requests; turns count.
        rate_per_s: jobs a second of an open loop; None takes the trace's times.
        is_open: jobs have times.
        max_model_len: prompts are cut so that they and their answers fit in; None knows no limit.
    """

    requests: int
    input: Lengths
    output: Lengths
    is_open: bool
    rate_per_s: float | None = None
    arrivals: ArrivalProcess = field(default_factory=ArrivalProcess)
    classes: tuple[LoadClass, ...] = (DEFAULT_CLASS,)
    sessions: SessionShape | None = None
    trace: Sequence[TraceRow] | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    max_model_len: int | None = None

    def jobs(self, seed: str) -> Iterator[Job]:
        """All jobs in the order of their times; at most `requests` turns in sum."""
        left = self.requests
        for index, (start_s, (load_class, turns)) in enumerate(
            zip(self._starts_s(seed), self._drawn(seed), strict=False)
        ):
            if left <= 0:
                return
            fitting = self._fit(turns)[:left]
            yield Job(index, start_s, load_class, fitting)
            left -= len(fitting)

    def _starts_s(self, seed: str) -> Iterator[float | None]:
        if not self.is_open:
            return repeat(None)
        if self.trace is not None:
            return iter(rescale(self.trace, rate_per_s=self.rate_per_s, time_scale=self.time_scale))
        assert self.rate_per_s is not None, "an open loop has a rate or a trace"
        return times_s(self.arrivals, self.rate_per_s, f"{seed}/arrivals")

    def _drawn(self, seed: str) -> Iterator[tuple[LoadClass, tuple[Turn, ...]]]:
        classes = random.Random(f"{seed}/classes")
        if self.trace is not None:
            for index, row in enumerate(self.trace):
                output_tokens = max(1, round(row.output_tokens * self.length_scale))
                turn = Turn(segments_of(row, index, self.length_scale), output_tokens)
                yield draw_class(self.classes, classes), (turn,)
            return
        lengths, sessions = random.Random(f"{seed}/lengths"), random.Random(f"{seed}/sessions")
        for index in range(self.requests):
            load_class = draw_class(self.classes, classes)
            yield load_class, self._turns(index, load_class, lengths, sessions)

    def _turns(
        self, index: int, load_class: LoadClass, lengths: random.Random, sessions: random.Random
    ) -> tuple[Turn, ...]:
        shape = self.sessions
        turns = []
        for number in range(shape.turns if shape else 1):
            said = Segment(f"job {index} turn {number}", (load_class.input or self.input).draw(lengths))
            segments: tuple[Segment, ...] = (said,)
            if shape and number == 0:
                segments = (Segment(f"system {shape.draw_system_prompt(sessions)}", shape.system_tokens), said)
            think_s = shape.draw_think_s(sessions) if shape and number else 0.0
            turns.append(Turn(segments, (load_class.output or self.output).draw(lengths), think_s))
        return tuple(turns)

    def _fit(self, turns: tuple[Turn, ...]) -> tuple[Turn, ...]:
        """The turns that fit into the model's window; the first one always does, cut where it must be."""
        if self.max_model_len is None:
            return turns
        kept: list[Turn] = []
        used = 0
        for turn in turns:
            said = sum(segment.num_tokens for segment in turn.segments)
            if used + said + turn.output_tokens > self.max_model_len:
                if not kept:
                    output_tokens = min(turn.output_tokens, self.max_model_len - 1)
                    segments = cut(turn.segments, self.max_model_len - output_tokens)
                    kept.append(Turn(segments, output_tokens, turn.think_s, was_cut=True))
                break
            kept.append(turn)
            used += said + turn.output_tokens
        return tuple(kept)
