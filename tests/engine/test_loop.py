"""The engine thread runs commands between steps, reports each step, and tells once when it fails."""

from __future__ import annotations

import queue
import threading

import pytest

from baton.clock import MonotonicClock
from baton.engine.engine import Engine, StepResult
from baton.engine.fake import FakeEngine, fake_next_token
from baton.engine.loop import EngineLoop
from baton.engine.request import EngineRequest, SamplingParams
from baton.errors import UnavailableError

TIMEOUT_S = 10.0


class Harness:
    """A loop whose steps land in a queue."""

    def __init__(self, engine: Engine) -> None:
        self.steps: queue.Queue[StepResult] = queue.Queue()
        self.failure: queue.Queue[BaseException] = queue.Queue()
        self.loop = EngineLoop(
            engine,
            clock=MonotonicClock(),
            on_step=lambda result, _: self.steps.put(result),
            on_fatal=self.failure.put,
        )
        self.loop.start()

    def tokens(self, count: int) -> list[int]:
        tokens: list[int] = []
        while len(tokens) < count:
            for output in self.steps.get(timeout=TIMEOUT_S).outputs:
                tokens += output.token_ids
        return tokens


def request(name: str) -> EngineRequest:
    return EngineRequest(
        request_id=name, prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=3, temperature=0.0)
    )


def test_commands_start_work_and_results_come_back() -> None:
    harness = Harness(FakeEngine())
    assert harness.loop.call(lambda engine: engine.add(request("a"))).result(TIMEOUT_S) == ""
    tokens = harness.tokens(3)
    assert tokens[0] == fake_next_token([1, 2, 3], 512)
    assert harness.loop.call(lambda engine: engine.load().blocks_owned).result(TIMEOUT_S) == 0
    harness.loop.stop(TIMEOUT_S)


def test_an_error_of_a_command_goes_to_its_caller() -> None:
    harness = Harness(FakeEngine())
    with pytest.raises(ZeroDivisionError):
        harness.loop.call(lambda _: 1 / 0).result(TIMEOUT_S)
    assert harness.failure.empty()
    harness.loop.stop(TIMEOUT_S)
    with pytest.raises(UnavailableError):
        harness.loop.call(lambda _: 1).result(TIMEOUT_S)


def test_a_failing_step_is_told_once_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = FakeEngine()
    broken = threading.Event()

    def forward(*_: object) -> None:
        broken.set()
        raise RuntimeError("no such page")

    monkeypatch.setattr(engine.runner, "forward", forward)
    harness = Harness(engine)
    harness.loop.submit(lambda e: e.add(request("a")))
    assert str(harness.failure.get(timeout=TIMEOUT_S)) == "no such page"
    assert broken.is_set()
    harness.loop.stop(TIMEOUT_S)
    assert harness.failure.empty()
