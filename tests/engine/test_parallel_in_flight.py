"""Several steps in flight: the same tokens, disjoint steps, and no block that a step uses changes hands."""

from __future__ import annotations

import itertools
import random
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from baton.engine.batch_buffers import BatchBuffers
from baton.engine.engine import Engine
from baton.engine.fake import FakeRunner, fake_next_token
from baton.engine.model import ForwardBatch
from baton.engine.request import EngineRequest, RequestOutput, SamplingParams
from baton.engine.scheduler import StepPlan, streamed_tokens
from baton.engine.sequence import SequenceState

_Work = tuple[ForwardBatch, Callable[[int, int], None] | None, int]


class PipelinedFake(FakeRunner):
    """Computes a step when it is finished, from a copy of its batch; checks the order."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.under_way: deque[_Work] = deque()
        self.most_under_way = 0

    def begin(
        self, batch: ForwardBatch, on_layers: Callable[[int, int], None] | None = None, layers_per_group: int = 4
    ) -> _Work:
        tensors = {name: getattr(batch, name).clone() for name in ForwardBatch.__dataclass_fields__}
        work = (replace(batch, **tensors), on_layers, layers_per_group)
        self.under_way.append(work)
        self.most_under_way = max(self.most_under_way, len(self.under_way))
        # A buffer that is read later than it should be gives no token at all.
        buffers = self.buffers
        assert isinstance(buffers, BatchBuffers)
        batch.token_ids.fill_(-1)
        return work

    def finish(self, work: _Work) -> Tensor:
        assert self.under_way.popleft() is work
        return self.forward(*work)


def make(depth: int, *, tokens: int = 64, size: int = 8, **options: Any) -> Engine:
    runner = PipelinedFake(max_batch_tokens=tokens, max_batch_size=size, **options)
    return Engine(runner, max_batch_tokens=tokens, max_batch_size=size, max_steps_in_flight=depth)


def request(name: str, prompt: list[int], max_tokens: int, **options: Any) -> EngineRequest:
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, **options)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


def expected(prompt: list[int], count: int) -> list[int]:
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(fake_next_token(tokens, 512))
    return tokens[len(prompt) :]


def check(engine: Engine) -> None:
    """No step in flight uses a block that is free, or that another sequence may write."""
    engine.pool.check()
    writers: dict[int, object] = {}
    for plan, _ in engine._in_flight:
        for row in plan.rows:
            size = engine.pool.block_size
            written = row.seq.block_ids[row.start // size : -(-(row.start + row.count) // size)]
            assert written, "a sequence in flight lost its blocks"
            for block in written:
                assert engine.pool._references[block] == 1, "a block is written that is shared or free"
                assert writers.setdefault(block, row.seq) is row.seq


def step(engine: Engine, outputs: dict[str, list[RequestOutput]]) -> StepPlan:
    result = engine.step()
    for output in result.outputs:
        outputs.setdefault(output.request_id, []).append(output)
    check(engine)
    return result.plan


@pytest.mark.parametrize("depth", [2, 3])
@pytest.mark.parametrize(("num_blocks", "chunk"), [(200, 64), (200, 9), (16, 64), (12, 13), (12, 64)])
def test_tokens_are_those_of_one_step_at_a_time(num_blocks: int, chunk: int, depth: int) -> None:
    generator = random.Random(5)
    engine = make(depth, tokens=chunk, num_blocks=num_blocks, block_size=4, max_model_len=48)
    prompts = {f"r{i}": [generator.randrange(512) for _ in range(generator.randrange(1, 30))] for i in range(24)}
    for name, prompt in prompts.items():
        assert engine.add(request(name, prompt, 12)) == ""
    outputs: dict[str, list[RequestOutput]] = {}
    for _ in range(2000):
        if not engine.has_work:
            break
        step(engine, outputs)
    for name, prompt in prompts.items():
        assert [t for output in outputs[name] for t in output.token_ids] == expected(prompt, 12)
    if num_blocks <= 16:
        assert engine.scheduler.num_preemptions > 0
    assert engine.runner.most_under_way == depth  # type: ignore[attr-defined]
    assert engine.pool.counts().owned == 0


def test_decode_rows_split_over_the_steps_and_a_prompt_streams() -> None:
    engine = make(2, tokens=2048, num_blocks=400, block_size=4, max_model_len=1500)
    outputs: dict[str, list[RequestOutput]] = {}
    for i in range(4):
        engine.add(request(f"r{i}", [i], 50))
    for _ in range(8):
        step(engine, outputs)
    finished = step(engine, outputs)
    in_flight = [row.seq.key[0] for plan, _ in engine._in_flight for row in plan.rows]
    assert sorted([*in_flight, *(row.seq.key[0] for row in finished.rows)]) == ["r0", "r1", "r2", "r3"]
    for i in range(4):
        engine.release((f"r{i}", 0))
    while engine.has_work:
        step(engine, outputs)
    engine.add(request("long", [i % 512 for i in range(1000)], 1))
    counts = []
    while engine.has_work:
        counts += [row.count for row in step(engine, outputs).rows]
    chunk = streamed_tokens(1000, 2)
    assert counts == [chunk] * (1000 // chunk) + [1000 % chunk]
    assert [t for output in outputs["long"] for t in output.token_ids] == expected([i % 512 for i in range(1000)], 1)


def test_streams_split_into_as_many_equal_groups_as_there_are_stages() -> None:
    engine = make(2, tokens=64, size=16, num_blocks=400, block_size=4, max_model_len=80)
    outputs: dict[str, list[RequestOutput]] = {}
    for i in range(16):
        engine.add(request(f"r{i}", [i, i + 1, i + 2], 40))
    plans = [step(engine, outputs) for _ in range(40)]
    groups = [{row.seq.key[0] for row in plan.rows} for plan in plans[-10:]]
    assert [len(group) for group in groups] == [8] * 10
    assert all(not before & after for before, after in itertools.pairwise(groups))
    # Nobody is ahead of anybody.
    lengths = [len(outputs[f"r{i}"]) for i in range(16)]
    assert max(lengths) - min(lengths) <= 1


@pytest.mark.parametrize("depth", [2, 3, 4])
def test_every_sequence_gets_its_turns_while_others_come_and_go(depth: int) -> None:
    generator = random.Random(depth)
    engine = make(depth, tokens=64, size=12, num_blocks=300, block_size=4, max_model_len=64)
    outputs: dict[str, list[RequestOutput]] = {}
    last_turn: dict[object, int] = {}
    for turn in range(300):
        if generator.random() < 0.4 and len(engine.scheduler) < 12:
            engine.add(request(f"r{turn}", [generator.randrange(512)] * generator.randrange(1, 30), 20))
        plan = step(engine, outputs)
        keys = [row.seq.key for row in plan.rows]
        assert len(keys) == len(set(keys)), "a sequence has two rows in a step"
        last_turn |= dict.fromkeys(keys, turn)
        for sequence in engine.scheduler.running:
            if sequence.num_output:
                assert turn - last_turn[sequence.key] <= 2 * depth, f"{sequence.key} is left behind"
    assert engine.scheduler.num_preemptions == 0


@given(st.integers(1, 100_000), st.integers(1, 8), st.integers(1, 512))
def test_streamed_tokens_are_the_best_of_all_chunks(pending: int, stages: int, step_cost: int) -> None:
    chunk = streamed_tokens(pending, stages, step_cost)
    assert chunk >= 1
    if stages > 1 and pending >= step_cost * (stages - 1):

        def cost(size: float) -> float:
            return (pending / size + stages - 1) * (step_cost + size)

        assert all(cost(chunk) <= 1.05 * cost(size) for size in (chunk / 2, chunk * 0.9, chunk * 1.1, chunk * 2))


def test_blocks_of_a_released_sequence_come_back_after_its_last_step() -> None:
    engine = make(2, num_blocks=200, block_size=4)
    outputs: dict[str, list[RequestOutput]] = {}
    for name in ("a", "b"):
        engine.add(request(name, [1, 2, 3, 4, 5], 50))
    step(engine, outputs)
    step(engine, outputs)
    ((plan, _),) = engine._in_flight
    key = plan.rows[0].seq.key
    sequence = plan.rows[0].seq
    owned = engine.pool.counts().owned
    assert engine.release(key)
    assert not engine.release(key)
    assert engine.scheduler.get(key) is None
    assert engine.pool.counts().owned == owned
    before = len(outputs.get(key[0], []))
    for _ in range(3):
        step(engine, outputs)
    assert sequence.block_ids == []
    assert len(outputs.get(key[0], [])) == before
    other = "b" if key[0] == "a" else "a"
    while engine.has_work:
        step(engine, outputs)
    assert [t for output in outputs[other] for t in output.token_ids] == expected([1, 2, 3, 4, 5], 50)
    assert engine.pool.counts().owned == 0


def test_a_held_sequence_keeps_its_blocks_and_samples_nothing() -> None:
    engine = make(2, num_blocks=200, block_size=4)
    outputs: dict[str, list[RequestOutput]] = {}
    engine.add(request("a", [1, 2, 3], 50))
    engine.add(request("b", [1, 2, 3], 50))
    step(engine, outputs)
    step(engine, outputs)
    key = engine._in_flight[0][0].rows[0].seq.key
    sequence = engine.scheduler.get(key)
    assert sequence is not None
    engine.hold(key)
    before = len(outputs.get(key[0], []))
    for _ in range(4):
        step(engine, outputs)
    assert len(outputs.get(key[0], [])) == before
    assert sequence.state is SequenceState.HELD
    assert sequence.block_ids
    engine.release(key)
    assert sequence.block_ids == []


def test_a_runner_that_fails_leaves_no_block_in_flight(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = make(3, num_blocks=200, block_size=4)
    outputs: dict[str, list[RequestOutput]] = {}
    for i in range(6):
        engine.add(request(f"r{i}", [i], 50))
    for _ in range(4):
        step(engine, outputs)
    assert len(engine._in_flight) == 2
    engine.release(engine._in_flight[1][0].rows[0].seq.key)

    def fail(work: _Work) -> Tensor:
        raise RuntimeError("a rank is gone")

    monkeypatch.setattr(engine.runner, "finish", fail)
    with pytest.raises(RuntimeError, match="a rank is gone"):
        engine.step()
    for sequence in engine.scheduler.sequences():
        engine.release(sequence.key)
    engine.pool.check()
    assert engine.pool.counts().owned == 0
    assert not engine.has_work


@pytest.mark.parametrize("seed", range(6))
def test_random_comings_and_goings(seed: int) -> None:
    generator = random.Random(seed)
    depth = generator.choice((2, 3, 4))
    engine = make(depth, tokens=generator.choice((5, 16, 64)), size=6, num_blocks=14, block_size=4, max_model_len=40)
    outputs: dict[str, list[RequestOutput]] = {}
    prompts: dict[str, list[int]] = {}
    gone: set[str] = set()
    for turn in range(400):
        if generator.random() < 0.3 and len(engine.scheduler) < 10:
            name = f"r{turn}"
            # Few different tokens, so that prefixes are shared.
            prompts[name] = [generator.randrange(2) for _ in range(generator.randrange(1, 30))]
            assert engine.add(request(name, prompts[name], generator.randrange(1, 9))) == ""
        live = [sequence.key for sequence in engine.scheduler.sequences()]
        if live and generator.random() < 0.1:
            key = generator.choice(live)
            gone.add(key[0])
            engine.release(key)
        step(engine, outputs)
    while engine.has_work:
        step(engine, outputs)
    for name, prompt in prompts.items():
        tokens = [t for output in outputs.get(name, []) for t in output.token_ids]
        assert tokens == expected(prompt, len(tokens))
        assert name in gone or outputs[name][-1].finish_reason is not None
    assert engine.pool.counts().owned == 0
