"""Layers in one call of the compiled kernels: the bits of the op-by-op path, for every family and any mix of rows."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import CASES, VOCAB_SIZE, write_checkpoint
from paged_session import PagedSequence, free_blocks
from torch import Tensor

from baton.engine.model import LlamaModel
from baton.engine.runner import ModelRunner, SequenceRows
from baton.errors import ConfigError
from baton.kernels import ops
from baton.kernels.decoder import Decoder

_DTYPES = ["float32", "bfloat16", "float16"]

pytestmark = pytest.mark.skipif(ops.backend() == "reference", reason="no compiled kernels")


def _runner(path: Path, **options: Any) -> ModelRunner:
    settings: dict[str, Any] = {"num_blocks": 250, "block_size": 8, "max_model_len": 400, **options}
    return ModelRunner(path, device="cpu", **settings)


def _prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(VOCAB_SIZE) for _ in range(length)]


def _decoder(runner: ModelRunner) -> Decoder:
    assert runner._model._decoder is not None
    return runner._model._decoder


def _session(runner: ModelRunner, *, native: bool, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    """Logits of every step of a seeded mix of chunks and decode rows, and the pool at the end."""
    decoder = _decoder(runner)
    runner.kv.zero_()
    rng, blocks = random.Random(seed), free_blocks(runner)
    sequences = [PagedSequence(blocks, 300, 8) for _ in range(6)]
    logits = []
    runner._model._decoder = decoder if native else None
    try:
        for _ in range(9):
            chosen = rng.sample(sequences, rng.randint(1, 6))
            rows = [
                s.rows(_prompt(rng.choice((1, 1, 1, 7, 33)), rng.random()), rng.choice(("last", "none", "all")))
                for s in chosen
            ]
            logits.append(runner.forward(runner.buffers.build(rows)).clone())
    finally:
        runner._model._decoder = decoder
    return logits, runner.kv.clone()


@pytest.mark.parametrize("dtype", _DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_bits_equal_the_path_by_single_ops(case: str, dtype: str, tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, case, dtype=dtype))
    (native, native_kv), (single, single_kv) = _session(runner, native=True), _session(runner, native=False)
    for step, (a, b) in enumerate(zip(native, single, strict=True)):
        assert torch.equal(a, b), f"step {step}"
    assert torch.equal(native_kv, single_kv)


@pytest.mark.parametrize("backend", [name for name in ops.available_backends() if name.startswith("cpu-")])
def test_every_build_and_two_threads(backend: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "qwen3", dtype="bfloat16")
    with ops.use_backend(backend):
        runner = _runner(path)
        assert _decoder(runner).backend == backend
        expected, pool = _session(runner, native=False)
        for threads in (1, 2):
            ops.set_num_threads(threads)
            logits, kv = _session(runner, native=True)
            assert all(torch.equal(a, b) for a, b in zip(logits, expected, strict=True))
            assert torch.equal(kv, pool)


@pytest.mark.parametrize("size", [1, 255, 256, 257, 390])
def test_row_blocks_leave_no_trace(size: int, tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, "llama-gqa-bias", dtype="bfloat16"))
    decoder, block_ids = _decoder(runner), list(range(50))
    batch = runner.buffers.build([SequenceRows(_prompt(size, 1), 0, block_ids, "all")])
    native = runner.forward(batch).clone()
    runner._model._decoder = None
    assert torch.equal(runner.forward(batch), native)
    runner._model._decoder = decoder


@pytest.mark.parametrize("per_group", [1, 2, 3, 4, 9])
def test_groups_of_layers_equal_one_call(per_group: int, tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, "mistral-window", dtype="bfloat16", num_hidden_layers=5))
    batch = runner.buffers.build([SequenceRows(_prompt(70, 2), 0, list(range(20))), SequenceRows([5], 0, [30])])
    whole = runner.forward(batch).clone()
    groups: list[tuple[int, int]] = []
    assert torch.equal(runner.forward(batch, lambda begin, end: groups.append((begin, end)), per_group), whole)
    assert [begin for begin, _ in groups] == list(range(0, 5, per_group))


def test_stages_equal_the_whole_model(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, "qwen2-window", dtype="bfloat16", num_hidden_layers=3))
    model, whole = runner._model, _decoder(runner)
    batch = runner.buffers.build([SequenceRows(_prompt(40, 3), 0, list(range(10)), "all")])
    expected = runner.forward(batch).clone()
    layers, cos, sin, _ = whole._kept
    stages = []
    for part, embed, head in ((layers[:1], whole._embed, None), (layers[1:], None, whole._head)):
        stage = ops.decoder(
            whole._shape,
            part,
            cos,
            sin,
            embed=embed,
            final_norm=whole._final_norm if head is not None else None,
            head=head,
            max_rows=64,
            max_logit_rows=8,
        )
        assert stage is not None
        stages.append(stage)
    stages[0].run(batch, 0, 1)
    hidden = stages[0].hidden_rows(40).clone()
    stages[1].run(batch, 0, 2, hidden=hidden)
    assert torch.equal(stages[1].logits(40), expected)
    with pytest.raises(ValueError, match="no embedding"):
        stages[1].run(batch, 0, 2)
    assert isinstance(model, LlamaModel)


def test_logits_outlive_the_next_step(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path), max_batch_size=4)
    first = runner.forward(runner.buffers.build([SequenceRows(_prompt(5, 4), 0, [0])]))
    kept = first.clone()
    runner.forward(runner.buffers.build([SequenceRows(_prompt(9, 5), 0, [1, 2], "all")]))
    assert torch.equal(first, kept)
    second = runner.forward(runner.buffers.build([SequenceRows(_prompt(9, 5), 0, [1, 2], "last")]))
    assert second.data_ptr() != first.data_ptr()


def test_bad_indices_are_refused(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path))
    for token_ids, block_ids, message in (
        ([VOCAB_SIZE], [0], "vocabulary has 320"),
        ([-1], [0], r"token_ids\[0\] is -1"),
        ([1], [250], "slots"),
    ):
        with pytest.raises(ValueError, match=message):
            runner.forward(runner.buffers.build([SequenceRows(token_ids, 0, block_ids)]))


def test_parts_of_a_step_are_timed(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path))
    decoder, batch = _decoder(runner), runner.buffers.build([SequenceRows([1, 2, 3], 0, [0])])
    decoder.measure(True)
    runner.forward(batch)
    assert min(decoder.times.linear_s, decoder.times.attention_s, decoder.times.rest_s) > 0
    decoder.measure(False)
    assert decoder.times.linear_s == 0


def test_a_decoder_that_computes_something_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = _runner(write_checkpoint(tmp_path))
    assert runner.warm_up()
    logits = Decoder.logits
    monkeypatch.setattr(Decoder, "logits", lambda self, count: logits(self, count) * 1.02)
    with pytest.raises(ConfigError, match="differ from the reference"):
        runner.warm_up()
