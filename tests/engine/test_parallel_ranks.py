"""Instances of several real processes: the single rank's tokens, the same bits in any company, and no hang."""

from __future__ import annotations

import random
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from model_factory import VOCAB_SIZE, write_checkpoint
from paged_session import PagedSequence, free_blocks, prefill, step
from parallel_ranks import FAIL_TAG, Instance, start_instance
from torch import Tensor

from baton.engine.engine import Engine, Runner
from baton.engine.request import EngineRequest, SamplingParams
from baton.engine.runner import ModelRunner, SequenceRows
from baton.errors import BatonError, DeadlineError, UnavailableError

_OPTIONS = {"num_blocks": 120, "block_size": 8, "max_model_len": 200, "max_batch_tokens": 64, "max_batch_size": 16}
# (name, family, TP, PP, layers per stage, overrides): uneven vocabularies, tied heads, biases, norms, windows, and KV
# heads that are held by several ranks (qwen3-bias-mqa has one, llama-gqa-bias two).
_LAYOUTS = [
    ("tp1-pp1", "llama-gqa-bias", 1, 1, (), {}),
    ("tp2-pp1", "llama-gqa-bias", 2, 1, (), {}),
    ("tp1-pp2", "mistral-window", 1, 2, (2, 1), {}),
    ("tp1-pp2-bf16", "llama-gqa-bias", 1, 2, None, {"dtype": "bfloat16", "num_hidden_layers": 4}),
    ("tp2-pp2", "qwen2", 2, 2, (), {}),
    ("tp4-pp1", "qwen3-bias-mqa", 4, 1, (), {}),
]


def _prompts(count: int) -> list[list[int]]:
    rng = random.Random(11)
    return [[rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 60))] for _ in range(count)]


def _tokens(runner: Runner, prompts: list[list[int]], *, depth: int, temperature: float = 0.0) -> list[list[int]]:
    engine = Engine(runner, max_batch_tokens=64, max_batch_size=8, max_steps_in_flight=depth)
    for index, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=12, temperature=temperature, seed=index, ignore_eos=True)
        assert engine.add(EngineRequest(request_id=str(index), prompt_token_ids=tuple(prompt), sampling=sampling)) == ""
    tokens: list[list[int]] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step().outputs:
            tokens[int(output.request_id)] += output.token_ids
        engine.pool.check()
    return tokens


class _Case:
    def __init__(self, instance: Instance, reference: ModelRunner, pp: int) -> None:
        self.instance = instance
        self.runner = instance.runner
        self.reference = reference
        self.pp = pp


@pytest.fixture(scope="module", params=_LAYOUTS, ids=lambda layout: layout[0])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[_Case]:
    _, family, tp, pp, layers_per_stage, overrides = request.param
    folder = tmp_path_factory.mktemp("parallel")
    model = write_checkpoint(folder / "model", family, vocab_size=VOCAB_SIZE + 1, **overrides)
    dtype = overrides.get("dtype", "float32")
    reference = ModelRunner(model, device="cpu", dtype=dtype, **_OPTIONS)  # type: ignore[arg-type]
    with start_instance(
        model, folder / "logs", tp=tp, pp=pp, layers_per_stage=layers_per_stage, dtype=dtype, **_OPTIONS
    ) as instance:
        yield _Case(instance, reference, pp)
        instance.runner.stop()
        _wait_for_end(instance)
        assert [instance.log(rank) for rank in instance.followers] == [""] * len(instance.followers)
        assert {process.exitcode for process in instance.followers.values()} <= {0}
        driver = instance.runner.figures
        for figures in map(instance.figures, instance.followers):
            assert figures.steps == driver.steps > 0
            assert 0 < figures.work_s < driver.busy_s
            assert figures.busy_s == 0
            assert 0 < figures.bubble_share_of(driver.busy_s) < 1


def test_greedy_and_sampled_tokens_are_the_single_ranks(case: _Case) -> None:
    prompts = _prompts(20)
    expected = _tokens(case.reference, prompts, depth=1)
    assert _tokens(case.runner, prompts, depth=1) == expected
    assert len({tuple(tokens) for tokens in expected}) == len(prompts), "the model says the same to everyone"
    if case.pp > 1:
        assert _tokens(case.runner, prompts, depth=case.pp) == expected
        figures = case.runner.figures
        assert 0 < figures.bubble_s < figures.step_s
        assert 0 < figures.bubble_share < 1
    sampled = _tokens(case.reference, prompts, depth=1, temperature=0.7)
    assert sampled != expected
    assert _tokens(case.runner, prompts, depth=case.pp, temperature=0.7) == sampled


def test_logits_are_bit_equal_in_any_company_and_for_any_chunks(case: _Case) -> None:
    runner = case.runner
    prompt = [(37 * i + 5) % VOCAB_SIZE for i in range(30)]
    whole = prefill(runner, _sequence(runner, 0), prompt, 60)  # type: ignore[arg-type]
    _assert_close(whole, prefill(case.reference, _sequence(runner, 0), prompt, 60))
    for chunk in (1, 7):
        assert torch.equal(prefill(runner, _sequence(runner, chunk), prompt, chunk), whole)  # type: ignore[arg-type]
    blocks = free_blocks(runner, 3)  # type: ignore[arg-type]
    sequence, companions = PagedSequence(blocks, 80, 8), [PagedSequence(blocks, 80, 8) for _ in range(3)]
    pieces = []
    for begin in range(0, len(prompt), 5):
        front = [companion.rows(_prompts(9)[index][:2], "last") for index, companion in enumerate(companions)]
        own = sequence.rows(prompt[begin : begin + 5])
        pieces.append(step(runner, [*front, own])[len(front) :])  # type: ignore[arg-type]
    assert torch.equal(torch.cat(pieces), whole)


def test_warm_up_runs_on_all_ranks_and_steps_go_on(case: _Case) -> None:
    assert case.runner.warm_up() is True
    logits = prefill(case.runner, _sequence(case.runner, 1), [1, 2, 3], 3)  # type: ignore[arg-type]
    _assert_close(logits, prefill(case.reference, _sequence(case.runner, 1), [1, 2, 3], 3))


def test_tags_reach_every_rank_with_its_layers(case: _Case) -> None:
    rows = [SequenceRows([3, 4], 0, [1], tag=7), SequenceRows([5], 0, [2]), SequenceRows([6], 0, [3], tag=9)]
    case.runner.forward(case.runner.buffers.build(rows), layers_per_group=100)
    # The next step's end tells that the hook of the one before has returned.
    case.runner.forward(case.runner.buffers.build(rows[1:2]), layers_per_group=100)
    for rank in case.instance.followers:
        assert "7,0,9" in (case.instance.logs / f"tags{rank}.txt").read_text()


def _sequence(runner: object, seed: int) -> PagedSequence:
    return PagedSequence(free_blocks(runner, seed), 80, 8)  # type: ignore[arg-type]


def _assert_close(logits: Tensor, expected: Tensor) -> None:
    assert logits.shape == expected.shape
    assert float((logits - expected).abs().max()) < 1e-3


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama-gqa-bias")


def _run_until(instance: Instance, sequence: PagedSequence, end_s: float) -> None:
    while time.monotonic() < end_s:
        sequence.length = 0
        prefill(instance.runner, sequence, [1, 2, 3], 1)  # type: ignore[arg-type]


def _wait_for_end(instance: Instance, limit_s: float = 10.0) -> None:
    deadline_s = time.monotonic() + limit_s
    for process in instance.followers.values():
        process.join(max(0.0, deadline_s - time.monotonic()))
        assert not process.is_alive(), f"{process.name} hangs"


def test_a_rank_killed_between_steps_ends_the_instance_with_its_name(model: Path, tmp_path: Path) -> None:
    broken: list[BatonError] = []
    told = threading.Event()

    def on_broken(error: BatonError) -> None:
        broken.append(error)
        told.set()

    with start_instance(
        model,
        tmp_path,
        pp=3,
        tick_s=0.1,
        on_broken=on_broken,
        **_OPTIONS,  # type: ignore[arg-type]
    ) as instance:
        prefill(instance.runner, _sequence(instance.runner, 0), [1, 2, 3], 3)  # type: ignore[arg-type]
        instance.kill(1)
        assert told.wait(5)
        assert isinstance(broken[0], UnavailableError)
        assert "control" in broken[0].message
        assert "rank 1" in broken[0].message
        with pytest.raises(UnavailableError, match="rank 1"):
            prefill(instance.runner, _sequence(instance.runner, 0), [1, 2, 3], 3)  # type: ignore[arg-type]
        _wait_for_end(instance)
        assert "rank 2 failed" in instance.log(0) or "rank 2 broke" in instance.log(0)
    assert len(broken) == 1


def test_a_rank_killed_during_steps_ends_the_instance_with_its_name(model: Path, tmp_path: Path) -> None:
    with start_instance(model, tmp_path, pp=2, tick_s=60, **_OPTIONS) as instance:  # type: ignore[arg-type]
        killer = threading.Timer(0.3, instance.kill, (0,))
        killer.start()
        sequence = _sequence(instance.runner, 0)
        begin_s = time.monotonic()
        with pytest.raises(UnavailableError, match="rank 0"):
            _run_until(instance, sequence, begin_s + 15)
        assert time.monotonic() - begin_s < 5, "the deadline had to pass"
        _wait_for_end(instance)


def test_a_rank_that_hangs_is_found_by_the_deadline(model: Path, tmp_path: Path) -> None:
    with start_instance(model, tmp_path, tp=2, deadline_s=5.0, tick_s=60, **_OPTIONS) as instance:  # type: ignore[arg-type]
        instance.kill(1, signal.SIGSTOP)
        try:
            with pytest.raises(
                DeadlineError, match=r"rank 0 of test-1, all-reduce: rank 1 did not answer within \d+\.\d s"
            ):
                prefill(instance.runner, _sequence(instance.runner, 0), [1, 2, 3], 3)  # type: ignore[arg-type]
        finally:
            instance.kill(1, signal.SIGCONT)
        _wait_for_end(instance)


def test_a_rank_that_fails_says_why(model: Path, tmp_path: Path) -> None:
    with start_instance(model, tmp_path, tp=2, tick_s=0.1, **_OPTIONS) as instance:  # type: ignore[arg-type]
        rows = [SequenceRows([3, 4], 0, [1], tag=FAIL_TAG)]
        with suppress(UnavailableError):
            instance.runner.forward(instance.runner.buffers.build(rows))
        _wait_for_end(instance)
        with pytest.raises(UnavailableError, match="rank 1 failed: the disk is full of water"):
            prefill(instance.runner, _sequence(instance.runner, 0), [1, 2, 3], 3)  # type: ignore[arg-type]
