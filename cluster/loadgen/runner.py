"""Sends a load: takes jobs, sends each request when it is due, writes down what became of it.

    open loop     a dispatcher starts every job at its time, whatever became of those before
    closed loop   `concurrency` clients take the next job when they have ended one

A run begins no job after `duration_s`, gives what runs then `drain_s`, and cancels the rest. `stop` ends it at once.

Ownership: the runner owns its tasks and joins them all before `run` returns; each request writes exactly one record.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine, Iterator
from typing import Any

import numpy as np

from baton.cluster.loadgen.answer import Answer, MalformedAnswerError
from baton.cluster.loadgen.client_share import ClientWatch
from baton.cluster.loadgen.prompts import Segment, TokenIds, TokenSource
from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.run import Limits, Progress, Run
from baton.cluster.loadgen.target import Prompt, Target
from baton.cluster.loadgen.workload import Job, Turn

__all__ = ["Runner"]

_JOIN_TIMEOUT_S = 10.0
# Event loops keep time to a millisecond. What is sent within it of its time is on time, and counts from when it was
# sent; only what is later counts from when it was due.
_TICK_S = 0.001
# Where a refusal does not say how long to wait.
_DEFAULT_RETRY_S = 1.0


class Runner:
    """One run of one load.

    Args:
        jobs: in the order of their times.
        concurrency: clients of a closed loop; None for jobs that have times.
        as_text: prompts are text.
        clock_s: monotonic.
    """

    def __init__(
        self,
        target: Target,
        jobs: Iterator[Job],
        tokens: TokenSource,
        limits: Limits,
        *,
        concurrency: int | None,
        as_text: bool,
        clock_s: Callable[[], float] = time.monotonic,
    ) -> None:
        self._target = target
        self._jobs = jobs
        self._tokens = tokens
        self._limits = limits
        self._concurrency = concurrency
        self._as_text = as_text
        self._clock_s = clock_s
        self._begin_s = 0.0
        self._records: list[Record] = []
        self._counts = dict.fromkeys(Outcome, 0)
        self._in_flight = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._idle = asyncio.Event()
        self._idle.set()
        self._stopped = asyncio.Event()
        self._bug: BaseException | None = None

    def stop(self) -> None:
        """End the run now; what is running becomes `unfinished`."""
        self._stopped.set()

    def progress(self) -> Progress:
        """How far it is."""
        counts = self._counts
        return Progress(
            self._now_s(), len(self._records), counts[Outcome.OK], self._in_flight, counts[Outcome.REJECTED]
        )

    async def run(self) -> Run:
        """Everything, within `duration_s + drain_s` and a moment."""
        watch = ClientWatch()
        self._begin_s = self._clock_s()
        feed = self._dispatch() if self._concurrency is None else self._closed_loop(self._concurrency)
        feeder, stopping = asyncio.ensure_future(feed), asyncio.ensure_future(self._stopped.wait())
        try:
            longest_s = self._limits.duration_s + self._limits.drain_s
            await asyncio.wait({feeder, stopping}, timeout=longest_s, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await _join({feeder, stopping, *self._tasks})
        if not feeder.cancelled():
            feeder.result()
        last_s = max((record.end_s for record in self._records), default=0.0)
        ordered = sorted(self._records, key=lambda record: (record.index, record.turn))
        return Run(ordered, max(last_s, 1e-9), self._stopped.is_set(), watch.share())

    async def _dispatch(self) -> None:
        """Every job at its time."""
        for job in self._jobs:
            assert job.start_s is not None
            if job.start_s > self._limits.duration_s or self._bug is not None:
                break
            prompt, prepared = self._prepare(Prompt(as_text=self._as_text), job, job.turns[0])
            # Also when it is late: the answers that came meanwhile are looked at first.
            await asyncio.sleep(max(0.0, job.start_s - self._now_s()))
            if self._in_flight >= self._limits.max_in_flight:
                self._write_unsent(job)
            else:
                self._spawn(self._converse(job, self._due_s(job.start_s), prompt, prepared))
        await self._until_idle()

    async def _closed_loop(self, concurrency: int) -> None:
        async def client() -> None:
            for job in self._jobs:
                prompt, prepared = self._prepare(Prompt(as_text=self._as_text), job, job.turns[0])
                if (now_s := self._now_s()) > self._limits.duration_s:
                    break
                await self._converse(job, now_s, prompt, prepared)

        for _ in range(concurrency):
            self._spawn(client())
        await self._until_idle()

    async def _converse(self, job: Job, scheduled_s: float, prompt: Prompt, prepared: Any) -> None:
        """The turns of one job, until one is not answered."""
        for number, turn in enumerate(job.turns):
            if number:
                scheduled_s = self._now_s() + turn.think_s
                if scheduled_s > self._limits.duration_s:
                    return
                prompt, prepared = self._prepare(prompt, job, turn)
                await asyncio.sleep(max(0.0, scheduled_s - self._now_s()))
                scheduled_s = self._due_s(scheduled_s)
            answer = await self._request(job, number, scheduled_s, prompt, prepared)
            if answer is None:
                return
            ids = self._heard_ids(job, number, answer)
            prompt.hear("".join(answer.text), ids)

    def _prepare(self, prompt: Prompt, job: Job, turn: Turn) -> tuple[Prompt, Any]:
        prompt.say(self._tokens.ids(turn.segments))
        return prompt, self._target.prepare(prompt, turn.output_tokens, job.load_class)

    def _heard_ids(self, job: Job, number: int, answer: Answer) -> TokenIds:
        """The answer as part of the next prompt; where no ids came, as many tokens of our own stand for it."""
        if answer.token_ids:
            return np.array(answer.token_ids, dtype=np.uint32)
        return self._tokens.ids((Segment(f"job {job.index} answer {number}", max(1, answer.output_tokens)),))

    async def _request(self, job: Job, number: int, scheduled_s: float, prompt: Prompt, prepared: Any) -> Answer | None:
        """One request and its record; the answer where it came to its end."""
        answer, sent_s, rejections = Answer(), self._now_s(), 0
        outcome, detail = Outcome.UNFINISHED, "the run ended"
        self._in_flight += 1
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                while True:
                    await self._target.send(prepared, answer)
                    if answer.http_status != 429:
                        break
                    rejections += 1
                    if rejections > self._limits.retries:
                        break
                    wait_s = _DEFAULT_RETRY_S if answer.retry_after_s is None else answer.retry_after_s
                    answer = Answer()
                    await asyncio.sleep(wait_s)
            outcome, detail = _outcome_of(answer)
        except TimeoutError:
            # Between two tries it is the refusals that took the time.
            refused = rejections and not answer.chunk_at_s
            outcome = Outcome.REJECTED if refused else Outcome.FAILED
            detail = f"no end within {self._limits.timeout_s:g} s"
        except (OSError, MalformedAnswerError) as error:
            outcome, detail = Outcome.FAILED, f"{type(error).__name__}: {error}"
        finally:
            self._in_flight -= 1
            turn = job.turns[number]
            begin_s = self._begin_s
            self._write(
                Record(
                    index=job.index,
                    turn=number,
                    class_name=job.load_class.name,
                    scheduled_s=scheduled_s,
                    sent_s=sent_s,
                    end_s=(answer.end_s - begin_s) if outcome is Outcome.OK else self._now_s(),
                    outcome=outcome,
                    asked_tokens=turn.output_tokens,
                    chunk_at_s=[at_s - begin_s for at_s in answer.chunk_at_s],
                    prompt_tokens=prompt.num_tokens if answer.prompt_tokens is None else answer.prompt_tokens,
                    cached_tokens=answer.cached_tokens,
                    output_tokens=answer.output_tokens,
                    rejections=rejections,
                    was_cut=turn.was_cut,
                    http_status=answer.http_status,
                    detail=detail,
                )
            )
        return answer if outcome is Outcome.OK else None

    def _write_unsent(self, job: Job) -> None:
        assert job.start_s is not None
        now_s = self._now_s()
        self._write(
            Record(
                index=job.index,
                turn=0,
                class_name=job.load_class.name,
                scheduled_s=job.start_s,
                sent_s=now_s,
                end_s=now_s,
                outcome=Outcome.NOT_SENT,
                asked_tokens=job.turns[0].output_tokens,
                detail=f"{self._limits.max_in_flight} requests were running already",
            )
        )

    def _write(self, record: Record) -> None:
        self._records.append(record)
        self._counts[record.outcome] += 1

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        self._idle.clear()
        task.add_done_callback(self._on_end)

    def _on_end(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not self._tasks:
            self._idle.set()
        if not task.cancelled() and (error := task.exception()) is not None:
            self._bug = error
            self._idle.set()

    async def _until_idle(self) -> None:
        """Until every task has ended; `run` bounds this."""
        await self._idle.wait()
        if self._bug is not None:
            raise self._bug

    def _due_s(self, scheduled_s: float) -> float:
        now_s = self._now_s()
        return now_s if abs(now_s - scheduled_s) <= _TICK_S else scheduled_s

    def _now_s(self) -> float:
        return self._clock_s() - self._begin_s


def _outcome_of(answer: Answer) -> tuple[Outcome, str]:
    if answer.http_status == 429:
        return Outcome.REJECTED, answer.error
    if answer.http_status != 200 or answer.error:
        return Outcome.FAILED, answer.error or f"status {answer.http_status}"
    if not answer.finish_reason or not answer.chunk_at_s:
        return Outcome.FAILED, f"the stream ended after {answer.seen_tokens} tokens without a finish_reason"
    return Outcome.OK, ""


async def _join(tasks: set[asyncio.Future[Any]]) -> None:
    """Cancel what still runs and wait until it has cleaned up."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks, timeout=_JOIN_TIMEOUT_S)
