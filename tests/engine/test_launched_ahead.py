"""Steps launched ahead: the outputs of one step at a time, late ends without a trace, no block that changes hands."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor

from baton.engine import step_buffers
from baton.engine.engine import Engine
from baton.engine.fake import FakeEngine, FakeRunner, fake_next_token
from baton.engine.model import ForwardBatch
from baton.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams
from baton.engine.step_buffers import StepSet

EOS = tuple(range(30))


def make(*, overlap: bool, **options: Any) -> Engine:
    settings = {"max_batch_tokens": 48, "max_batch_size": 6, "block_size": 4, "num_blocks": 60, "max_model_len": 64}
    return FakeEngine(**{**settings, "eos_token_ids": EOS, "overlap": overlap, **options})


def check(engine: Engine) -> None:
    """No step in flight uses a block that is free, or that another sequence may write."""
    engine.pool.check()
    assert len(engine._in_flight) <= 2
    writers: dict[int, object] = {}
    for plan, _ in engine._in_flight:
        for row in plan.rows:
            size = engine.pool.block_size
            written = row.seq.block_ids[row.start // size : -(-(row.start + row.count) // size)]
            assert written, "a sequence in flight lost its blocks"
            for block in written:
                assert engine.pool._references[block] == 1, "a block is written that is shared or free"
                assert writers.setdefault(block, row.seq) is row.seq


def step(engine: Engine, outputs: dict[str, list[RequestOutput]]) -> None:
    for output in engine.step().outputs:
        outputs.setdefault(output.request_id, []).append(output)
    check(engine)


def run(engine: Engine) -> dict[str, list[RequestOutput]]:
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(5000):
        if not engine.has_work:
            break
        step(engine, outputs)
    assert not engine.has_work
    assert engine.pool.counts().owned == 0
    return outputs


def merged(outputs: list[RequestOutput]) -> tuple[Any, ...]:
    """What a client sees of a request."""
    return (
        [token for output in outputs for token in output.token_ids],
        [entry for output in outputs for entry in output.logprobs],
        outputs[0].prompt_logprobs,
        outputs[-1].finish_reason,
        outputs[-1].stop_token_id,
        outputs[-1].error,
    )


def any_request(name: str, rng: random.Random, *, plain: bool) -> EngineRequest:
    options: dict[str, Any] = {}
    if not plain:
        options = rng.choice(
            (
                {"logprobs": 2},
                {"repetition_penalty": 1.3, "presence_penalty": 0.5},
                {"logit_bias": ((5, 30.0), (77, 10.0))},
                {"prompt_logprobs": 1},
                {"min_tokens": 6},
                {"bad_words_ids": ((3, 4), (9,))},
            )
        )
    sampling = SamplingParams(
        max_tokens=rng.randrange(1, 25),
        temperature=rng.choice((0.0, 0.0, 6.0, 10.0)),
        top_k=rng.choice((0, 50)),
        top_p=rng.choice((1.0, 0.9)),
        seed=rng.randrange(1 << 60),
        ignore_eos=rng.random() < 0.3,
        stop_token_ids=tuple(range(40, 60)) if rng.random() < 0.3 else (),
        **options,
    )
    # Few different tokens, so that prefixes are shared.
    prompt = tuple(rng.randrange(2) for _ in range(rng.randrange(1, 40)))
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=sampling, priority=rng.randrange(2))


class LateSet(StepSet):
    """As a GPU that is behind: copies are over only when somebody waits for them."""

    def upload(self, to: Tensor, num_words: int) -> None:
        self.sent = self.words[:num_words].copy()
        super().upload(to, num_words)

    def download(self, tokens: Tensor) -> None:
        self.late = tokens.clone()
        super().download(torch.full_like(tokens, -5))

    def wait(self, num_tokens: int, deadline_s: float) -> npt.NDArray[np.int64]:
        assert np.array_equal(self.words[: len(self.sent)], self.sent), "written while the device may still read it"
        super().download(self.late)
        return super().wait(num_tokens, deadline_s)


@pytest.fixture(autouse=True)
def _late_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(step_buffers, "StepSet", LateSet)


@pytest.mark.parametrize("seed", range(8))
def test_outputs_are_those_of_one_step_at_a_time(seed: int) -> None:
    rng = random.Random(seed)
    share_plain = rng.choice((1.0, 0.9, 0.5, 0.0))
    requests = [any_request(f"r{i}", rng, plain=rng.random() < share_plain) for i in range(30)]
    options = {"num_blocks": rng.choice((60, 18)), "max_batch_tokens": rng.choice((48, 9))}
    expected: dict[str, tuple[Any, ...]] = {}
    for request in requests:
        alone = make(overlap=False, **options)
        alone.add(request)
        expected[request.request_id] = merged(run(alone)[request.request_id])
    engine = make(overlap=True, **options)
    outputs: dict[str, list[RequestOutput]] = {}
    waiting = list(requests)
    while waiting or engine.has_work:
        while waiting and rng.random() < 0.3:
            engine.add(waiting.pop())
        step(engine, outputs)
    assert {name: merged(found) for name, found in outputs.items()} == expected
    assert engine.pool.counts().owned == 0


@pytest.mark.parametrize("seed", range(6))
def test_comings_and_goings(seed: int) -> None:
    rng = random.Random(100 + seed)
    engine = make(overlap=True, num_blocks=18, max_batch_tokens=rng.choice((7, 16, 48)), eos_token_ids=())
    outputs: dict[str, list[RequestOutput]] = {}
    prompts: dict[str, list[int]] = {}
    gone: set[str] = set()
    for turn in range(400):
        if rng.random() < 0.3 and len(engine.scheduler) < 10:
            name = f"r{turn}"
            prompts[name] = [rng.randrange(2) for _ in range(rng.randrange(1, 30))]
            sampling = SamplingParams(max_tokens=rng.randrange(1, 20), temperature=0.0)
            request = EngineRequest(request_id=name, prompt_token_ids=tuple(prompts[name]), sampling=sampling)
            assert engine.add(request, prefill_only=rng.random() < 0.2, remote_prefill=rng.random() < 0.2) == ""
        live = engine.scheduler.sequences()
        if live and rng.random() < 0.15:
            sequence = rng.choice(live)
            if sequence.state.value == "reserved":
                engine.prefill_here(sequence.key)
            elif rng.random() < 0.3:
                gone.add(sequence.key[0])
                engine.hold(sequence.key)
            else:
                gone.add(sequence.key[0])
                engine.release(sequence.key)
        step(engine, outputs)
    for _ in range(3000):
        for sequence in engine.scheduler.sequences():
            if sequence.state.value == "reserved":
                engine.prefill_here(sequence.key)
            elif sequence.state.value == "held":
                gone.add(sequence.key[0])
                engine.release(sequence.key)
        if not engine.has_work:
            break
        step(engine, outputs)
    assert not engine.has_work
    for name, prompt in prompts.items():
        tokens = [t for output in outputs.get(name, []) for t in output.token_ids]
        known = list(prompt)
        for token in tokens:
            assert token == fake_next_token(known, 512)
            known.append(token)
        assert name in gone or outputs[name][-1].finish_reason is not None
    assert engine.pool.counts().owned == 0


def greedy(name: str, prompt: list[int], max_tokens: int, **options: Any) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


def expected_tokens(prompt: list[int], count: int) -> list[int]:
    known = list(prompt)
    for _ in range(count):
        known.append(fake_next_token(known, 512))
    return known[len(prompt) :]


def test_the_next_step_is_on_the_device_before_the_last_one_is_read() -> None:
    engine = make(overlap=True, eos_token_ids=())
    engine.add(greedy("a", [1, 2, 3], 10))
    steps = 0
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        step(engine, outputs)
        steps += 1
        # Nothing is computed behind the last token, whose number is known beforehand.
        assert len(engine._in_flight) == int(steps < 10)
    assert steps == 10
    assert [t for output in outputs["a"] for t in output.token_ids] == expected_tokens([1, 2, 3], 10)


def test_an_end_that_is_seen_late_leaves_no_trace() -> None:
    prompt = [1, 2, 3, 4, 5, 6, 7]
    tokens = expected_tokens(prompt, 3)
    # The second token ends the sequence, and would be the first of a new block.
    engine = make(overlap=True, eos_token_ids=(tokens[1],))
    engine.add(greedy("a", prompt, 20))
    sequence = engine.scheduler.sequences()[0]
    outputs: dict[str, list[RequestOutput]] = {}
    while ("a" not in outputs) or outputs["a"][-1].finish_reason is None:
        step(engine, outputs)
    assert outputs["a"][-1].finish_reason is FinishReason.STOP
    assert [t for output in outputs["a"] for t in output.token_ids] == tokens[:2]
    (late,) = engine._in_flight
    assert late[0].rows[0].seq is sequence
    assert len(sequence.block_ids) == 3, "the row behind the end has taken a block"
    assert engine.pool.counts().owned == 3
    before = sum(len(found) for found in outputs.values())
    step(engine, outputs)
    assert sum(len(found) for found in outputs.values()) == before
    assert not engine.has_work
    assert engine.pool.counts().owned == 0
    assert sequence.token_ids == prompt + tokens[:2]
    # Prefixes that others find hold what was asked for and written, not what came behind the end.
    again = make(overlap=True, eos_token_ids=())
    engine.add(greedy("b", prompt + tokens, 4))
    again.add(greedy("b", prompt + tokens, 4))
    assert [o.token_ids for o in run(engine)["b"]] == [o.token_ids for o in run(again)["b"]]


def test_nothing_is_launched_behind_a_step_that_the_host_samples() -> None:
    engine = make(overlap=True, eos_token_ids=(), max_batch_tokens=8)
    engine.add(greedy("plain", [1, 2, 3], 12))
    engine.add(greedy("told", [4, 5], 4, logprobs=1))
    # There would be more to do at any time: chunks of this one.
    engine.add(greedy("long", list(range(40)), 9))
    outputs: dict[str, list[RequestOutput]] = {}
    while engine.has_work:
        was_told = "told" in outputs and outputs["told"][-1].finish_reason is not None
        step(engine, outputs)
        assert not any(handle.needs_host for _, handle in engine._in_flight)
        assert len(engine._in_flight) == int(was_told and engine.scheduler.has_work)
    for name, prompt, count in (("plain", [1, 2, 3], 12), ("told", [4, 5], 4), ("long", list(range(40)), 9)):
        assert [t for output in outputs[name] for t in output.token_ids] == expected_tokens(prompt, count)
    assert len([entry for output in outputs["told"] for entry in output.logprobs]) == 4


def test_no_number_in_a_step_is_no_index_in_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(overlap=True, eos_token_ids=())
    runner = engine.runner
    assert isinstance(runner, FakeRunner)
    forward = FakeRunner.forward
    seen: list[int] = []

    def broken(batch: ForwardBatch, *arguments: Any) -> Tensor:
        seen.extend(batch.token_ids.tolist())
        logits = forward(runner, batch, *arguments)
        if int(batch.context_lens[0]) == 5:
            logits[0] = float("nan")
        return logits

    monkeypatch.setattr(runner, "forward", broken)
    engine.add(greedy("bad", [1, 2, 3], 10))
    engine.add(greedy("good", list(range(6)), 10))
    outputs = run(engine)
    assert min(seen) >= 0
    assert outputs["bad"][-1].finish_reason is FinishReason.ERROR
    assert "not a number" in outputs["bad"][-1].error
    assert [t for o in outputs["bad"] for t in o.token_ids] == expected_tokens([1, 2, 3], 2)
    assert [t for o in outputs["good"] for t in o.token_ids] == expected_tokens(list(range(6)), 10)


def test_a_step_that_fails_leaves_no_block_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(overlap=True, eos_token_ids=())
    outputs: dict[str, list[RequestOutput]] = {}
    for i in range(4):
        engine.add(greedy(f"r{i}", [i], 50))
    for _ in range(4):
        step(engine, outputs)
    engine.release(engine._in_flight[0][0].rows[0].seq.key)

    def fail(*_: Any) -> torch.Tensor:
        raise RuntimeError("an illegal memory access was encountered")

    monkeypatch.setattr(engine.runner, "forward", fail)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        engine.step()
    for sequence in engine.scheduler.sequences():
        assert sequence.num_future == sequence.num_in_flight == 0
        engine.release(sequence.key)
    engine.pool.check()
    assert engine.pool.counts().owned == 0
    assert not engine.has_work
