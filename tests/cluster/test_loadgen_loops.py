"""Open and closed loops, their limits, and lateness, against targets that are functions."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from baton.cluster.loadgen.answer import Answer
from baton.cluster.loadgen.plan import Plan
from baton.cluster.loadgen.prompts import TokenSource
from baton.cluster.loadgen.records import Record
from baton.cluster.loadgen.run import Limits, Run
from baton.cluster.loadgen.runner import Runner
from baton.cluster.loadgen.target import Prompt, ServerInfo

LIMITS = Limits(duration_s=20.0, drain_s=20.0, timeout_s=20.0, max_in_flight=1000)


class CodeTarget:
    """A target that is a function: what it does is what the server does."""

    info = ServerInfo(kind="code", url="code", model="code")

    def __init__(self, serve: Callable[[int, Answer], Awaitable[None]]) -> None:
        self._serve = serve
        self.sent = 0
        self.at_once = 0
        self.most_at_once = 0

    def prepare(self, prompt: Prompt, output_tokens: int, load_class: Any) -> Any:
        return None

    async def send(self, prepared: Any, answer: Answer) -> None:
        number, self.sent = self.sent, self.sent + 1
        self.at_once += 1
        self.most_at_once = max(self.most_at_once, self.at_once)
        try:
            await self._serve(number, answer)
        finally:
            self.at_once -= 1

    async def close(self) -> None:
        pass


def answered(answer: Answer) -> None:
    answer.take_tokens([1], "a", time.monotonic())
    answer.finish_reason, answer.http_status = "length", 200


def run_code(plan: Plan, serve: Callable[[int, Answer], Awaitable[None]], limits: Limits = LIMITS) -> tuple[Run, Any]:
    target = CodeTarget(serve)
    (point,) = plan.points()
    jobs = plan.workload(point, trace=None, max_model_len=None).jobs("1")
    runner = Runner(
        target,
        jobs,
        TokenSource(seed="1", vocabulary=4000),
        limits,
        concurrency=point.concurrency,
        as_text=False,
    )
    return asyncio.run(runner.run()), target


def outcomes(records: list[Record]) -> list[str]:
    return [str(record.outcome) for record in records]


def test_an_open_loop_waits_for_no_answer() -> None:
    everyone = 40
    come = 0
    all_there = asyncio.Event()

    async def serve(number: int, answer: Answer) -> None:
        nonlocal come
        come += 1
        if come == everyone:
            all_there.set()
        # None is answered before the last one is there: a client that waits would stand still here.
        await all_there.wait()
        answered(answer)

    run, target = run_code(Plan(rate_per_s=400.0, requests=everyone, output="1"), serve)
    assert outcomes(run.records) == ["ok"] * everyone
    assert target.most_at_once == everyone


def test_time_that_a_stalled_client_lost_is_not_hidden() -> None:
    def stand_still() -> None:
        time.sleep(0.4)

    async def serve(number: int, answer: Answer) -> None:
        if number == 0:
            # The whole generator, as under a garbage collection or on a busy machine.
            stand_still()
        answered(answer)

    run, _ = run_code(Plan(rate_per_s=50.0, arrivals="constant", requests=15, output="1"), serve)
    late = [record for record in run.records if record.lag_s > 0.05]
    assert len(late) >= 5
    for record in late:
        assert record.ttft_s is not None
        assert record.ttft_s >= record.lag_s
    assert max(record.lag_s for record in run.records) >= 0.3


def test_a_closed_loop_keeps_its_number_at_once() -> None:
    async def serve(number: int, answer: Answer) -> None:
        await asyncio.sleep(0.002)
        answered(answer)

    run, target = run_code(Plan(concurrency=5, requests=31, output="1"), serve)
    assert outcomes(run.records) == ["ok"] * 31
    assert target.most_at_once == 5
    assert [record.index for record in run.records] == list(range(31))


def test_a_run_ends_in_its_time_and_says_what_was_left() -> None:
    async def serve(number: int, answer: Answer) -> None:
        if number > 3:
            await asyncio.Event().wait()
        answered(answer)

    limits = Limits(duration_s=0.1, drain_s=1.0, timeout_s=60.0, max_in_flight=3)
    run, _ = run_code(Plan(rate_per_s=100.0, arrivals="constant", requests=10_000, output="1"), serve, limits)
    # Those that came due within a tenth of a second: what could not be answered is in the books.
    found = outcomes(run.records)
    assert found == ["ok"] * 4 + ["unfinished"] * 3 + ["not sent"] * (len(found) - 7)
    assert len(found) in (9, 10)


def test_a_request_that_takes_too_long_has_failed() -> None:
    async def serve(number: int, answer: Answer) -> None:
        await asyncio.Event().wait()

    limits = Limits(duration_s=20.0, drain_s=20.0, timeout_s=0.05, max_in_flight=8)
    run, _ = run_code(Plan(concurrency=2, requests=4), serve, limits)
    assert outcomes(run.records) == ["failed"] * 4
    assert run.records[0].detail == "no end within 0.05 s"


def test_a_bug_of_ours_is_raised() -> None:
    async def serve(number: int, answer: Answer) -> None:
        raise ZeroDivisionError

    for plan in (Plan(concurrency=2, requests=4), Plan(rate_per_s=100.0, requests=4)):
        with pytest.raises(ZeroDivisionError):
            run_code(plan, serve)
