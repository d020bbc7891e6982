"""Launched steps on CPU: the same bits as the buffers' batches, padding that touches nothing, graphs in their order."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from model_factory import VOCAB_SIZE, write_checkpoint

from baton.engine.engine import Engine
from baton.engine.graph_buckets import GraphBuckets
from baton.engine.graph_capture import EagerGraphs, Replay
from baton.engine.request import EngineRequest, SamplingParams
from baton.engine.runner import ModelRunner
from baton.engine.step_buffers import StepBuffers, StepSet
from baton.engine.step_launcher import StepLauncher
from baton.errors import ConfigError, DeadlineError
from baton.kernels import ops


def _runner(path: Path, **options: object) -> ModelRunner:
    settings: dict[str, object] = {"num_blocks": 120, "block_size": 8, "max_model_len": 100, "max_batch_size": 12}
    settings |= {"max_batch_tokens": 64, "has_scratch_block": True, **options}
    return ModelRunner(path, device="cpu", **settings)  # type: ignore[arg-type]


def _launcher(runner: ModelRunner, graphs: EagerGraphs | None, buckets: GraphBuckets | None = None) -> StepLauncher:
    launcher = StepLauncher(runner, max_batch_tokens=64, max_batch_size=12, graphs=graphs, buckets=buckets)
    launcher.warm_up()
    return launcher


def _requests(count: int, seed: int) -> list[EngineRequest]:
    rng = random.Random(seed)
    return [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=tuple(rng.randrange(VOCAB_SIZE) for _ in range(rng.randrange(1, 40))),
            sampling=SamplingParams(
                max_tokens=rng.randrange(1, 30),
                temperature=rng.choice((0.0, 0.7, 2.0)),
                top_p=rng.choice((1.0, 0.8)),
                top_k=rng.choice((0, 20)),
                seed=i,
            ),
        )
        for i in range(count)
    ]


def _run(engine: Engine, requests: list[EngineRequest]) -> dict[str, list[int]]:
    tokens: dict[str, list[int]] = {}
    for request in requests:
        assert engine.add(request) == ""
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    assert engine.pool.counts().owned == 0
    return tokens


@pytest.mark.parametrize("case", ["llama-gqa-bias", "mistral-window", "qwen3"])
@pytest.mark.parametrize("overlap", [False, True], ids=["one at a time", "launched ahead"])
def test_tokens_of_a_model_are_bit_equal_with_and_without_graphs(case: str, overlap: bool, tmp_path: Path) -> None:
    write_checkpoint(tmp_path, case, dtype="bfloat16")
    requests = _requests(20, seed=1)
    settings = {"max_batch_tokens": 64, "max_batch_size": 12}
    expected = _run(Engine(_runner(tmp_path), **settings), requests)
    for graphs in (EagerGraphs(), None):
        runner = _runner(tmp_path)
        launcher = _launcher(runner, graphs)
        assert _run(Engine(runner, launcher=launcher, overlap=overlap, **settings), requests) == expected
        if graphs is not None:
            assert graphs.num_captures == launcher.num_graphs > 0
            assert graphs.num_replays > 20


@pytest.mark.skipif("triton" not in ops.available_backends(), reason="no Triton")
def test_the_kernels_of_a_gpu_give_the_tokens_of_the_cpu(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, "qwen3", num_hidden_layers=2, head_dim=16)
    settings = {"max_batch_tokens": 16, "max_batch_size": 2}
    requests = [
        EngineRequest(
            request_id=f"r{i}",
            prompt_token_ids=tuple(range(3 + 7 * i, 8 + 14 * i)),
            sampling=SamplingParams(max_tokens=3, temperature=0.9 * i, top_p=0.9, seed=i),
        )
        for i in range(2)
    ]
    options = {"block_size": 16, "num_blocks": 8, "max_model_len": 48, **settings}
    expected = _run(Engine(_runner(tmp_path, **options), **settings), requests)
    runner = _runner(tmp_path, **options)
    with ops.use_backend("triton"):
        launcher = StepLauncher(runner, graphs=EagerGraphs(), buckets=GraphBuckets([2]), **settings)
        launcher.warm_up()
        assert _run(Engine(runner, launcher=launcher, **settings), requests) == expected


def test_padding_rows_touch_nothing_but_the_scratch_block(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    runner = _runner(tmp_path)
    runner.kv.fill_(float("nan"))
    launcher = _launcher(runner, EagerGraphs(), GraphBuckets([12]))
    assert bool(runner.kv.isnan().all()), "recording has written to the pool"
    engine = Engine(runner, max_batch_tokens=64, max_batch_size=12, launcher=launcher)
    request = EngineRequest(
        request_id="a", prompt_token_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=20, temperature=0.0)
    )
    engine.add(request)
    sequence = engine.scheduler.sequences()[0]
    blocks: set[int] = set()
    while engine.has_work:
        engine.step()
        blocks |= set(sequence.block_ids)
    others = [block for block in range(runner.num_blocks) if block not in blocks]
    assert bool(runner.kv[others].isnan().all())
    # 3 tokens of prompt and 19 of the 20 drawn: the last one is never computed.
    written = (~runner.kv[sorted(blocks)].isnan()).all(-1).all(3).all(2).all(1)  # [blocks, block_size]
    assert int(written.sum()) == 22


def test_graphs_are_recorded_largest_first_and_told_of(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path))
    sizes: list[int] = []
    told: list[tuple[int, int]] = []

    class Watched(EagerGraphs):
        def capture(self, body: Callable[[], None]) -> Replay:
            sizes.append(body.args[0])  # type: ignore[attr-defined]
            return super().capture(body)

    launcher = StepLauncher(runner, max_batch_tokens=64, max_batch_size=12, graphs=Watched())
    launcher.warm_up(lambda done, total: told.append((done, total)))
    assert sizes == [12, 8, 4, 2, 1]
    assert told == [(n, 5) for n in range(1, 6)]


def test_a_step_that_cannot_be_recorded_is_told_with_the_way_out(tmp_path: Path) -> None:
    class Failing:
        def capture(self, body: Callable[[], None]) -> Replay:
            raise RuntimeError("operation not permitted when stream is capturing")

    runner = _runner(write_checkpoint(tmp_path))
    launcher = StepLauncher(runner, max_batch_tokens=64, max_batch_size=12, graphs=Failing())
    with pytest.raises(ConfigError, match=r"12 rows cannot be recorded.*gpu\.cuda_graphs: false"):
        launcher.warm_up()


def test_on_layers_hears_of_every_group_whether_replayed_or_not(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, num_hidden_layers=5))
    engine = Engine(
        runner,
        max_batch_tokens=64,
        max_batch_size=12,
        layers_per_group=2,
        launcher=_launcher(runner, EagerGraphs()),
    )
    engine.add(EngineRequest(request_id="a", prompt_token_ids=(1, 2), sampling=SamplingParams(max_tokens=3)))
    heard: list[tuple[int, int, int]] = []
    while engine.has_work:
        engine.step(lambda plan, begin, end: heard.append((plan.rows[0].start, begin, end)))
    assert heard == [(start, *group) for start in (0, 2, 3) for group in ((0, 2), (2, 4), (4, 5))]


def test_a_device_that_hangs_is_told_by_its_name() -> None:
    class Never:
        def query(self) -> bool:
            return False

    step_set = StepSet(4, 4, torch.device("cpu"))
    step_set._event = Never()
    with pytest.raises(DeadlineError, match="cpu has not finished a step within 0 s"):
        step_set.wait(1, 0.01)


def test_sets_are_free_once_their_step_is_over() -> None:
    buffers = StepBuffers(2, num_words=8, max_rows=2, device=torch.device("cpu"))
    first, second = buffers.take(), buffers.take()
    assert first is not second
    with pytest.raises(AssertionError, match="more steps in flight"):
        buffers.take()
    buffers.give_back(first)
    assert buffers.take() is first
