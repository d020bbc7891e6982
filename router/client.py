"""From a spec to text: what HTTP and gRPC share. Admission, dispatch, detokenisation, stop strings, usage, metrics.

    async with contextlib.aclosing(client.generate(spec)) as deltas:
        async for delta in deltas: ...

Closing the generator stops the work of every choice within one engine step.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import secrets
from collections.abc import AsyncGenerator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from time import monotonic, time
from typing import Protocol

from baton.engine.request import EngineRequest, FinishReason, Phases, RequestOutput, TokenLogprobs
from baton.engine.tokenizer import IncrementalDetokenizer, Tokenizer
from baton.errors import BatonError, CancelledError, NotFoundError
from baton.log import annotate
from baton.metrics import Metrics
from baton.router.admission.gate import Gate
from baton.router.admission.ticket import Ticket
from baton.router.attainment import attainment
from baton.router.dispatch import Dispatcher, LiveRequest
from baton.router.journal import RequestJournal, Visit
from baton.router.request_ids import engine_id
from baton.router.salt import salt_of
from baton.router.sessions import Sessions
from baton.router.stop_strings import StopChecker
from baton.router.timelines import Timelines
from baton.router.timing import Timing
from baton.router.token_bounds import TokenBounds
from baton.router.validation import ChoiceSpec, GenerationSpec
from baton.tracing import Tracing

__all__ = ["ChoiceDelta", "GenerationClient", "TokenSink"]


_BEYOND_SHARE = 1
"""Workers serve so much less urgently what a tenant has beyond his share."""


class TokenSink(Protocol):
    """Where plain tokens of a request of one choice may go at once, instead of becoming deltas; see `direct.py`."""

    @property
    def is_open(self) -> bool:
        """Whether `write` may be called now."""
        ...

    def write(self, text: str, token_id: int) -> None:
        """A token and the text that became certain with it."""
        ...


@dataclass(slots=True, kw_only=True)
class ChoiceDelta:
    """What one choice gained. The counters and instances are cumulative; `finish_reason` marks the last delta.

    Attributes:
        index: which choice.
        text: new text (what may begin a stop string is held back).
        token_ids: new tokens, one entry of `logprobs` and `text_offsets` each where log-probabilities are asked for.
        text_offsets: where each token's text begins in the choice's text, in characters.
        prompt_logprobs: with the first delta; the first position is None.
        finish_reason: "stop" or "length".
        matched_stop: the stop string that ended the choice.
        prompt_tokens, completion_tokens, cached_tokens: usage so far.
        timing: where the time until the first token went.
    """

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    text_offsets: list[int] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: str | None = None
    matched_stop: str | None = None
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    prefill_instance: str = ""
    decode_instance: str = ""
    timing: Timing | None = None


class GenerationClient:
    """Runs specs on the cluster. One per router.

    Args:
        request_timeout_s: longest life of one request; a caller's own deadline may be shorter.
        model: name of what is served, for traces.
        sessions: where sessions were served; None: this client's own memory.
        timelines: where those of the last requests are kept; None: a store of its own.

    Attributes:
        timelines: of the last requests.
    """

    def __init__(
        self,
        dispatcher: Dispatcher,
        tokenizer: Tokenizer,
        gate: Gate,
        metrics: Metrics,
        *,
        request_timeout_s: float,
        model: str = "",
        tracing: Tracing | None = None,
        sessions: Sessions | None = None,
        timelines: Timelines | None = None,
    ) -> None:
        self._model = model
        self._tracing = tracing or Tracing()
        self.timelines = timelines if timelines is not None else Timelines()
        self._dispatcher = dispatcher
        self._tokenizer = tokenizer
        self._gate = gate
        self._metrics = metrics
        self._request_timeout_s = request_timeout_s
        self._latencies = _TokenLatencies(metrics)
        self._sessions = sessions or Sessions()
        self._running: dict[str, set[_Run]] = {}
        self.idle = asyncio.Event()
        """Set while nothing is in work."""
        self.idle.set()

    @property
    def num_running(self) -> int:
        """Choices accepted and not ended."""
        return self._gate.num_requests

    def set_num_routers(self, num: int) -> None:
        """So many routers share the tenants' token rates while the shared state is away."""
        self._gate.set_num_routers(max(num, 1))

    def is_running(self, request_id: str) -> bool:
        """Whether a request with this public id is in work."""
        return request_id in self._running

    async def close(self) -> None:
        """End what goes on in the background; nothing is let in any more."""
        await self._gate.close()
        await self._sessions.close()

    def running(self) -> Iterator[tuple[str, float, LiveRequest]]:
        """(public id, arrival on the event loop's clock, choice) of all that is in work, the oldest request first."""
        for request_id, runs in self._running.items():
            for run in runs:
                yield request_id, run.arrival_s, run.live

    def abort(self, request_id: str) -> None:
        """Stop every request with this public id; whoever consumes it gets a `CancelledError`.

        Raises:
            NotFoundError: none is in work.
        """
        if request_id not in self._running:
            raise NotFoundError(f"no request {request_id!r} is running here", code="request_not_found")
        for run in self._running[request_id]:
            error = CancelledError(f"the request {request_id!r} was aborted")
            run.live.abort(error)
            if run.ticket is not None:
                self._gate.abort(run.ticket, error)

    def check_rate(self, tenant: str, token_bounds: Callable[[], TokenBounds]) -> None:
        """See `Gate.check_rate`."""
        self._gate.check_rate(tenant, token_bounds)

    def check(
        self, spec: GenerationSpec, *, timeout_s: float | None = None, visit: Visit | None = None
    ) -> float | None:
        """Refuse at once what `generate` would refuse now, for less; what it returns is for `generate`.

        Raises:
            OverloadedError: refused.
        """
        try:
            return self._gate.check(spec, self._deadline_s(timeout_s))
        except BatonError as error:
            journal = self._begin_journal(spec, visit)
            unique = secrets.token_hex(4)
            for choice in spec.choices:
                unique_id = engine_id(spec.request_id, unique, choice.index)
                of_choice = journal.choice(choice.index, unique_id, prompt_tokens=len(choice.prompt_token_ids))
                self.timelines.begin(of_choice.timeline)
            journal.end("error", error.message)
            raise

    async def generate(
        self,
        spec: GenerationSpec,
        *,
        timeout_s: float | None = None,
        predicted_s: float | None = None,
        sink: TokenSink | None = None,
        visit: Visit | None = None,
    ) -> AsyncGenerator[ChoiceDelta, None]:
        """All choices' deltas, interleaved as they come.

        Args:
            sink: takes plain tokens while it is open and the last delta is dealt with. Only for specs of one choice
                without stop strings and log-probabilities.
            visit: the call that it comes from.
            predicted_s: what `check` has just returned.

        Raises:
            OverloadedError: the server is full, or it would be too late (before anything is started).
            CancelledError: `abort` was called.
            UnavailableError, DeadlineError, BatonError: see `Dispatcher.stream`; the other choices are stopped too.
        """
        deadline_s = self._deadline_s(timeout_s)
        unique = secrets.token_hex(4)
        journal = self._begin_journal(spec, visit)
        runs = [
            _Run(self, spec, choice, engine_id(spec.request_id, unique, choice.index), journal, deadline_s)
            for choice in spec.choices
        ]
        if sink is not None:
            assert len(runs) == 1
            assert not spec.stop
            runs[0].write_to(sink)

        def on_queued(ticket: Ticket) -> None:
            for run in runs:
                run.ticket, run.live.phase = ticket, "it waited in the router's queue"

        self._running.setdefault(spec.request_id, set()).update(runs)
        self.idle.clear()
        outcome, reason = "abort", ""
        try:
            async with self._gate.admitted(spec, deadline_s, on_queued, predicted_s=predicted_s) as ticket:
                ticket.works = [run.live for run in runs]
                for run in runs:
                    run.admitted(ticket)
                self._metrics.requests_running.inc(len(runs))
                try:
                    if spec.session_id:
                        served_by = await self._sessions.find(spec.tenant, spec.session_id)
                        for run in runs:
                            run.live.session_instances = served_by
                    deltas = runs[0].deltas() if len(runs) == 1 else _merged(runs)
                    async with contextlib.aclosing(deltas):
                        async for delta in deltas:
                            yield delta
                finally:
                    self._metrics.requests_running.dec(len(runs))
        except BatonError as error:
            outcome, reason = "error", error.message
            raise
        finally:
            self._running[spec.request_id].difference_update(runs)
            if not self._running[spec.request_id]:
                del self._running[spec.request_id]
            journal.end(outcome, reason)
            if not self._running:
                self.idle.set()

    def _deadline_s(self, timeout_s: float | None) -> float:
        limit_s = self._request_timeout_s if timeout_s is None else min(timeout_s, self._request_timeout_s)
        return asyncio.get_running_loop().time() + limit_s

    def _begin_journal(self, spec: GenerationSpec, visit: Visit | None) -> RequestJournal:
        journal = RequestJournal.begin(
            visit,
            spec.request_id,
            model=self._model,
            arrived_s=monotonic(),
            arrived_unix_s=time(),
            now_s=monotonic,
            tracing=self._tracing,
        )
        if journal.trace_id:
            annotate(trace_id=journal.trace_id)
        return journal


class _TokenLatencies:
    """Inter-token latencies of tokens that took the short way, told to the metrics once for all of one message."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._waiting: list[float] = []

    def add(self, latency_s: float) -> None:
        """One token."""
        if not self._waiting:
            asyncio.get_running_loop().call_soon(self._tell)
        self._waiting.append(latency_s)

    def _tell(self) -> None:
        latencies_s, self._waiting = self._waiting, []
        self._metrics.observe_latencies(latencies_s)
        self._metrics.generation_tokens.inc(len(latencies_s))


class _Run:
    """One choice: its tokens in, its text out."""

    def __init__(
        self,
        client: GenerationClient,
        spec: GenerationSpec,
        choice: ChoiceSpec,
        request_id: str,
        journal: RequestJournal,
        deadline_s: float,
    ) -> None:
        self._dispatcher = client._dispatcher
        self._gate = client._gate
        self.ticket: Ticket | None = None
        """Of its whole request, from when it waits or runs."""
        self._tokenizer = client._tokenizer
        self._metrics = client._metrics
        self._sessions = client._sessions
        self._latencies = client._latencies
        self._spec = spec
        self._choice = choice
        request = EngineRequest(
            request_id=request_id,
            prompt_token_ids=choice.prompt_token_ids,
            sampling=choice.sampling,
            priority=client._gate.engine_priority(spec),
            cache_salt=salt_of(spec.tenant, spec.cache_salt),
        )
        self._journal = journal.choice(choice.index, request_id, prompt_tokens=len(choice.prompt_token_ids))
        client.timelines.begin(self._journal.timeline)
        self.live = LiveRequest(request=request, deadline_s=deadline_s, journal=self._journal)
        self.arrival_s = self._last_token_s = journal.arrived_s
        self._detokenizer = IncrementalDetokenizer(
            client._tokenizer, choice.prompt_token_ids, skip_special_tokens=spec.skip_special_tokens
        )
        self._stop = StopChecker(spec.stop, include=spec.include_stop)
        self._num_chars = 0
        self._completion_tokens = 0
        self._cached_tokens = 0
        self._first = True

    def admitted(self, ticket: Ticket) -> None:
        """It waits no more."""
        self.ticket = ticket
        if ticket.is_beyond_share:
            request = self.live.request
            self.live.request = dataclasses.replace(request, priority=request.priority + _BEYOND_SHARE)
        self._journal.admitted()

    def write_to(self, sink: TokenSink) -> None:
        """Let plain tokens after the first go to `sink` while it is open."""

        emit, detokenize, observe = self.live.emitted_ids.append, self._detokenizer.step, self._latencies.add

        def take(token_id: int) -> bool:
            if self._first or not sink.is_open:
                return False
            now_s = monotonic()
            observe(now_s - self._last_token_s)
            self._last_token_s = now_s
            self._completion_tokens += 1
            emit(token_id)
            text = detokenize(token_id)
            self._num_chars += len(text)
            sink.write(text, token_id)
            return True

        self.live.tap = take

    async def deltas(self) -> AsyncGenerator[ChoiceDelta, None]:
        """This choice's deltas, the last one with a finish reason."""
        outcome, reason = "abort", ""
        try:
            async with contextlib.aclosing(self._dispatcher.stream(self.live)) as outputs:
                async for output in outputs:
                    delta = self._delta(output)
                    if delta.finish_reason is not None:
                        outcome = delta.finish_reason
                    yield delta
                    if delta.finish_reason is not None:
                        return
        except BatonError as error:
            outcome, reason = "error", error.message
            raise
        finally:
            # It holds this run, which holds it.
            self.live.tap = None
            self._observe_end(outcome, reason)

    def _delta(self, output: RequestOutput) -> ChoiceDelta:
        delta = ChoiceDelta(index=self._choice.index, prompt_tokens=len(self._choice.prompt_token_ids))
        if self._first and (output.token_ids or output.finish_reason):
            self._begin(delta, output)
        if output.token_ids:
            if not self._completion_tokens or output.phases is not None:
                self._take_phases(output.phases or Phases())
            self._observe_tokens(len(output.token_ids))
        self._take_tokens(delta, output)
        if self._stop.matched is not None:
            delta.finish_reason, delta.matched_stop = FinishReason.STOP.value, self._stop.matched
        elif output.finish_reason is not None:
            delta.text += self._finish_text()
            delta.finish_reason = output.finish_reason.value
            if self._stop.matched is not None:
                delta.finish_reason, delta.matched_stop = FinishReason.STOP.value, self._stop.matched
        self._num_chars += len(delta.text)
        delta.completion_tokens = self._completion_tokens
        delta.cached_tokens = self._cached_tokens
        delta.prefill_instance, delta.decode_instance = self.live.prefill_instance, self.live.decode_instance
        delta.timing = self._journal.timing
        return delta

    def _begin(self, delta: ChoiceDelta, output: RequestOutput) -> None:
        self._first = False
        if self._choice.index == 0 and self.ticket is not None:
            self._gate.started(self.ticket)
        if self._spec.session_id:
            pair = {"decode": self.live.decode_instance}
            if self.live.prefill_instance != self.live.decode_instance:
                pair["prefill"] = self.live.prefill_instance
            self._sessions.remember(self._spec.tenant, self._spec.session_id, pair)
        self._cached_tokens = output.cached_tokens
        self._metrics.prompt_tokens.inc(delta.prompt_tokens)
        self._metrics.prefix_cache_queries_tokens.inc(delta.prompt_tokens)
        self._metrics.prefix_cache_hit_tokens.inc(output.cached_tokens)
        delta.prompt_logprobs = output.prompt_logprobs
        if self._spec.echo:
            delta.text = self._tokenizer.decode(
                self._choice.prompt_token_ids, skip_special_tokens=self._spec.skip_special_tokens
            )

    def _take_tokens(self, delta: ChoiceDelta, output: RequestOutput) -> None:
        ends_by_token = output.stop_token_id is not None and not self._spec.include_stop
        for position, token_id in enumerate(output.token_ids):
            self._completion_tokens += 1
            delta.token_ids.append(token_id)
            if output.logprobs:
                delta.logprobs.append(output.logprobs[position])
                delta.text_offsets.append(self._num_chars + len(delta.text))
            if ends_by_token and position == len(output.token_ids) - 1:
                continue  # the token that ends the answer is not part of its text
            text = self._detokenizer.step(token_id)
            if self._completion_tokens <= self._choice.sampling.min_tokens:
                delta.text += text
                continue
            delta.text += self._stop.feed(text)
            if self._stop.matched is not None:
                return

    def _finish_text(self) -> str:
        text = self._stop.feed(self._detokenizer.flush())
        return text if self._stop.matched is not None else text + self._stop.flush()

    def _take_phases(self, phases: Phases) -> None:
        journal, metrics, attempt = self._journal, self._metrics, self.live.attempt
        if journal.has_begun(attempt):
            # It may have taken no time at all: the second token was there before the first had been told.
            if journal.second_token(phases, attempt):
                metrics.observe_ttft_phases({"first_step": phases.first_step_s})
            return
        is_news = journal.timing is None
        journal.first_token(phases, attempt, prefill_instance=self.live.prefill_instance)
        if is_news and journal.timing is not None:
            by_phase = journal.timing.by_phase()
            del by_phase["first_step"]
            metrics.observe_ttft_phases(by_phase)
            metrics.queue_time_s.observe(journal.queue_s + phases.reserve_s + phases.prefill_queue_s)

    def _observe_tokens(self, num_tokens: int) -> None:
        now_s = monotonic()
        if self._completion_tokens == 0:
            self._metrics.time_to_first_token_s.observe(now_s - self.arrival_s)
        else:
            self._metrics.inter_token_latency_s.observe((now_s - self._last_token_s) / num_tokens)
        self._last_token_s = now_s
        self._metrics.generation_tokens.inc(num_tokens)

    def _observe_end(self, outcome: str, reason: str) -> None:
        self._metrics.requests.labels(finish_reason=outcome).inc()
        self._observe_slo(outcome)
        self._metrics.request_duration_s.observe(monotonic() - self.arrival_s)
        self._journal.ended(
            outcome, completion_tokens=self._completion_tokens, cached_tokens=self._cached_tokens, error=reason
        )

    def _observe_slo(self, outcome: str) -> None:
        if outcome == "abort":
            return  # its client did not wait to see
        slo = self._gate.slo_of(self._spec)
        timing = self._journal.timing
        found = attainment(
            ttft_limit_s=slo.ttft_s,
            tpot_limit_s=slo.tpot_s,
            ttft_s=None if timing is None else timing.ttft_s,
            duration_s=self._last_token_s - self.arrival_s,
            tokens=self._completion_tokens,
        )
        if found is not None:
            self._metrics.slo_requests.labels(outcome=found).inc()


async def _merged(runs: Iterable[_Run]) -> AsyncGenerator[ChoiceDelta, None]:
    """Deltas of all runs as they come; the first failure ends them all."""
    queue: asyncio.Queue[ChoiceDelta | Exception | None] = asyncio.Queue()

    async def pump(run: _Run) -> None:
        try:
            async with contextlib.aclosing(run.deltas()) as deltas:
                async for delta in deltas:
                    queue.put_nowait(delta)
            queue.put_nowait(None)
        except Exception as error:
            queue.put_nowait(error)  # raised where the deltas are consumed

    tasks = [asyncio.create_task(pump(run)) for run in runs]
    running = len(tasks)
    try:
        while running:
            item = await queue.get()
            if isinstance(item, ChoiceDelta):
                yield item
            elif item is None:
                running -= 1
            else:
                raise item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
