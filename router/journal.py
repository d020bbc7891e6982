"""What becomes of a request, noted as it goes, and told to whoever asks: its timeline, its trace, its line in the log.

    Visit            a call as its transport sees it                   HTTP's middleware, gRPC's Generate
    RequestJournal   what the client makes of it: one for all choices  GenerationClient.generate
    Journal          one choice: its attempts and tokens               Dispatcher, GenerationClient

Times are of the clock that is handed in. A few notes per request and none per token: what is told in the end is made of
what was noted.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from baton.engine.request import Phases
from baton.router.timelines import Timeline
from baton.router.timing import Timing
from baton.tracing import OpenSpan, Tracing

__all__ = ["Journal", "RequestJournal", "Visit"]

Clock = Callable[[], float]


@dataclass(slots=True, kw_only=True)
class Visit:
    """One call for a generation.

    Attributes:
        route: for the log.
        traceparent, tracestate: W3C trace context that came with it; empty where none did.
        journal: what became of it, once it was taken.
    """

    route: str
    traceparent: str = ""
    tracestate: str = ""
    journal: RequestJournal | None = None

    @property
    def operation(self) -> str:
        """As OpenTelemetry names it."""
        return "text_completion" if self.route.endswith("/v1/completions") else "chat"


class Journal:
    """One choice.

    Attributes:
        timeline: what is kept of it.
        queue_s: in admission, before anything was begun.
        timing: where the time until the first token went, once that is known.
        now_s: the clock.
    """

    def __init__(self, timeline: Timeline, *, arrived_s: float, now_s: Clock, root: OpenSpan | None) -> None:
        self.timeline = timeline
        self.now_s = now_s
        self.timing: Timing | None = None
        self._arrived_s = arrived_s
        self._root = root
        self._route_s = 0.0
        self._attempt: OpenSpan | None = None
        self._begun = -1
        self._attempt_s = self._free_s = arrived_s
        self.queue_s = 0.0

    def admitted(self) -> None:
        """It waits no more."""
        self._attempt_s = self._free_s = self.now_s()
        self.queue_s = self._attempt_s - self._arrived_s
        self._add("queue", self._arrived_s, self._attempt_s)

    def dispatched(self, route_began_s: float, attempt: int, decode_id: str, prefill_id: str | None) -> str:
        """Workers are chosen and about to be told; returns the trace context for them, empty where there is none."""
        now_s = self.now_s()
        if attempt:
            self._add("pause", self._free_s, route_began_s, attempt=attempt)
        self._add("route", route_began_s, now_s, attempt=attempt)
        self._route_s += now_s - route_began_s
        self._attempt_s = now_s
        timeline = self.timeline
        timeline.decode_instance, timeline.prefill_instance = decode_id, ""
        if self._root is None:
            return ""
        attributes: dict[str, str | int | float | bool] = {
            "baton.attempt": attempt,
            "baton.decode_instance": decode_id,
            "baton.choice": timeline.choice,
        }
        if prefill_id is not None:
            attributes["baton.prefill_instance"] = prefill_id
        self._attempt = self._root.start("attempt", start_s=now_s, attributes=attributes, kind="client")
        return self._attempt.traceparent

    def attempt_ended(self, attempt: int) -> None:
        """The attempt is over, whether the request is or not."""
        self._free_s = self.now_s()
        where, began_s = self.timeline.decode_instance, self._attempt_s - self._arrived_s
        self.timeline.add("attempt", began_s, self._free_s - self._attempt_s, where=where, attempt=attempt)
        if self._attempt is not None:
            self._attempt.end(self._free_s)
            self._attempt = None

    def has_begun(self, attempt: int) -> bool:
        """Whether the first token of this attempt was here."""
        return self._begun == attempt

    def first_token(self, phases: Phases, attempt: int, *, prefill_instance: str) -> None:
        """The first token of an attempt is here."""
        now_s, timeline = self.now_s(), self.timeline
        self._begun = attempt
        timeline.prefill_instance = prefill_instance
        if self.timing is None:
            ttft_s = timeline.ttft_s = now_s - self._arrived_s
            self.timing = Timing(queue_s=self.queue_s, route_s=self._route_s, ttft_s=ttft_s, phases=phases)
        decode, begin_s = timeline.decode_instance, self._attempt_s
        for name, where, seconds in (
            ("reserve", decode, phases.reserve_s),
            ("prefill_queue", prefill_instance, phases.prefill_queue_s),
            ("prefill", prefill_instance, phases.prefill_s),
            ("transfer", decode, phases.transfer_exposed_s),
            ("attach", decode, phases.attach_s),
            ("other", "", now_s - self._attempt_s - phases.until_first_token_s),
        ):
            if seconds > 0:
                self._keep(name, begin_s, seconds, where, attempt)
                begin_s += seconds

    def second_token(self, phases: Phases, attempt: int) -> bool:
        """The second token of an attempt is here; whether `timing` is the richer for it."""
        is_of_timing = self.timing is not None and not self.timing.phases.first_step_s and not attempt
        began_s = self.now_s() - phases.first_step_s
        self._keep("first_step", began_s, phases.first_step_s, self.timeline.decode_instance, attempt)
        if is_of_timing:
            assert self.timing is not None
            self.timing = self.timing.with_second_token(phases)
        return is_of_timing

    def ended(self, outcome: str, *, completion_tokens: int, cached_tokens: int, error: str = "") -> None:
        """The choice is over."""
        now_s, timeline = self.now_s(), self.timeline
        timeline.outcome, timeline.error = outcome, error[:512]
        timeline.completion_tokens, timeline.cached_tokens = completion_tokens, cached_tokens
        timeline.duration_s = now_s - self._arrived_s
        if timeline.ttft_s is not None:
            self._add("stream", self._arrived_s + timeline.ttft_s, now_s)

    def _add(self, name: str, begin_s: float, end_s: float, *, attempt: int = 0) -> None:
        """A stretch of this router's own."""
        self._keep(name, begin_s, end_s - begin_s, "", attempt)
        if self._root is not None:
            self._root.record(name, begin_s, end_s, {"baton.attempt": attempt, "baton.choice": self.timeline.choice})

    def _keep(self, name: str, begin_s: float, duration_s: float, where: str, attempt: int) -> None:
        self.timeline.add(name, begin_s - self._arrived_s, duration_s, where=where, attempt=attempt)


@dataclass(slots=True, kw_only=True)
class RequestJournal:
    """All choices of one request.

    Attributes:
        arrived_s, arrived_unix_s: on the clock, and since the epoch.
    """

    request_id: str
    model: str
    arrived_s: float
    arrived_unix_s: float
    now_s: Clock
    root: OpenSpan | None = None
    choices: list[Journal] = field(default_factory=list)

    @staticmethod
    def begin(
        visit: Visit | None,
        request_id: str,
        *,
        model: str,
        arrived_s: float,
        arrived_unix_s: float,
        now_s: Clock,
        tracing: Tracing,
    ) -> RequestJournal:
        """A request was taken that had arrived at `arrived_s`."""
        journal = RequestJournal(
            request_id=request_id, model=model, arrived_s=arrived_s, arrived_unix_s=arrived_unix_s, now_s=now_s
        )
        if visit is not None:
            visit.journal = journal
        if tracing.is_on:
            operation = "chat" if visit is None else visit.operation
            journal.root = tracing.start(
                operation,
                start_s=arrived_s,
                traceparent="" if visit is None else visit.traceparent,
                tracestate="" if visit is None else visit.tracestate,
                attributes={
                    "gen_ai.operation.name": operation,
                    "gen_ai.provider.name": "baton",
                    "gen_ai.request.model": model,
                    "baton.request_id": request_id,
                },
            )
        return journal

    @property
    def trace_id(self) -> str:
        """Empty where it is not traced."""
        return "" if self.root is None else self.root.trace_id

    def choice(self, index: int, unique_id: str, *, prompt_tokens: int) -> Journal:
        """One choice, which waits to be let in."""
        timeline = Timeline(
            request_id=self.request_id,
            unique_id=unique_id,
            choice=index,
            trace_id=self.trace_id,
            arrived_unix_s=self.arrived_unix_s,
            prompt_tokens=prompt_tokens,
        )
        journal = Journal(timeline, arrived_s=self.arrived_s, now_s=self.now_s, root=self.root)
        self.choices.append(journal)
        return journal

    def summary(self) -> dict[str, Any]:
        """What the log tells of it."""
        timelines = [choice.timeline for choice in self.choices]
        found: dict[str, Any] = {
            "prompt_tokens": sum(timeline.prompt_tokens for timeline in timelines),
            "cached_tokens": sum(timeline.cached_tokens for timeline in timelines),
            "completion_tokens": sum(timeline.completion_tokens for timeline in timelines),
        }
        if timelines:
            first = timelines[0]
            found |= {
                "ttft_s": None if first.ttft_s is None else round(first.ttft_s, 6),
                "prefill_instance": first.prefill_instance,
                "decode_instance": first.decode_instance,
                "outcome": first.outcome,
                "error": first.error,
            }
        return {key: value for key, value in found.items() if value not in ("", None)}

    def end(self, outcome: str, error: str) -> None:
        """Every choice is over; of those that were not let in this is the outcome."""
        for choice in self.choices:
            if not choice.timeline.outcome:
                choice.ended(outcome, completion_tokens=0, cached_tokens=0, error=error)
        if self.root is None:
            return
        summary = self.summary()
        attributes: dict[str, Any] = {
            "gen_ai.usage.input_tokens": summary["prompt_tokens"],
            "gen_ai.usage.output_tokens": summary["completion_tokens"],
            "gen_ai.response.model": self.model,
            "baton.cached_tokens": summary["cached_tokens"],
        }
        if self.choices:
            attributes["gen_ai.response.finish_reasons"] = [choice.timeline.outcome for choice in self.choices]
            timing = self.choices[0].timing
            if timing is not None:
                attributes |= {f"baton.ttft.{phase}_s": seconds for phase, seconds in timing.by_phase().items()}
                attributes["baton.ttft_s"] = timing.ttft_s
        self.root.end(self.now_s(), attributes, error=summary.get("error", ""))
