"""The runner: bit-equal logits in any company, layer callbacks, batch layout, and what settings are refused."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factory import VOCAB_SIZE, write_checkpoint
from paged_session import PagedSequence, free_blocks, prefill, step

from baton.engine.batch_buffers import BatchBuffers
from baton.engine.runner import ModelRunner, SequenceRows
from baton.errors import ConfigError
from baton.kernels import ops

_CASES = ["llama-gqa-bias", "mistral-window", "qwen3"]


def _prompt(length: int, seed: int) -> list[int]:
    return [random.Random(seed).randrange(VOCAB_SIZE) for _ in range(length)]


def _runner(path: Path, **options: object) -> ModelRunner:
    settings: dict[str, object] = {"num_blocks": 250, "block_size": 8, "max_model_len": 200, **options}
    return ModelRunner(path, device="cpu", **settings)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("dtype", "quantization"), [("float32", "none"), ("bfloat16", "none"), ("bfloat16", "int8"), ("bfloat16", "int4")]
)
@pytest.mark.parametrize("case", _CASES)
def test_logits_are_bit_equal_for_any_chunks_batch_and_block_size(
    case: str, dtype: str, quantization: str, tmp_path: Path
) -> None:
    runner = _runner(write_checkpoint(tmp_path, case, dtype=dtype), quantization=quantization)
    prompt = _prompt(75, seed=1)
    whole = prefill(runner, PagedSequence(free_blocks(runner), 75, 8), prompt, 75)
    for chunk in (1, 7, 32):
        assert torch.equal(prefill(runner, PagedSequence(free_blocks(runner, chunk), 75, 8), prompt, chunk), whole)

    # In company: other prompts come and go in front and behind, in every step another mix.
    blocks, rng = free_blocks(runner, 2), random.Random(3)
    sequence, companions = PagedSequence(blocks, 75, 8), [PagedSequence(blocks, 150, 8) for _ in range(8)]
    pieces = []
    while sequence.length < 75:
        count = min(rng.choice((1, 2, 13)), 75 - sequence.length)
        front = [c.rows(_prompt(rng.choice((1, 1, 9)), rng.random()), "last") for c in companions[: rng.randrange(9)]]
        own = sequence.rows(prompt[sequence.length : sequence.length + count])
        pieces.append(step(runner, [*front, own])[len(front) :])
    assert torch.equal(torch.cat(pieces), whole)

    other = _runner(tmp_path, block_size=5, quantization=quantization)
    assert torch.equal(prefill(other, PagedSequence(free_blocks(other), 75, 5), prompt, 10), whole)


def test_kv_does_not_depend_on_which_logits_are_wanted(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path))
    prompt = _prompt(40, seed=4)
    whole = prefill(runner, PagedSequence(free_blocks(runner), 40, 8), prompt, 40)
    sequence = PagedSequence(free_blocks(runner), 40, 8)
    assert step(runner, [sequence.rows(prompt[:30], "none")]).shape == (0, VOCAB_SIZE)
    assert torch.equal(step(runner, [sequence.rows(prompt[30:], "last")])[0], whole[-1])


def test_stale_memory_is_never_read(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path))
    prompt = _prompt(43, seed=5)
    clean = prefill(runner, PagedSequence(free_blocks(runner), 43, 8), prompt, 11)
    runner.kv.fill_(float("nan"))
    assert torch.equal(prefill(runner, PagedSequence(free_blocks(runner, 1), 43, 8), prompt, 11), clean)


def test_on_layers_tells_each_group_once_its_kv_is_written(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, num_hidden_layers=5))
    block_ids = [9, 4]
    runner.kv.zero_()
    seen: list[tuple[int, int]] = []

    def on_layers(begin: int, end: int) -> None:
        seen.append((begin, end))
        written = runner.kv[block_ids].flatten(2).abs().amax(2).amin(0)  # [layers]
        assert bool((written[:end] > 0).all())
        assert not bool(written[end:].any())

    for per_group, groups in ((2, [(0, 2), (2, 4), (4, 5)]), (1, [(n, n + 1) for n in range(5)]), (9, [(0, 5)])):
        runner.kv.zero_()
        seen.clear()
        batch = runner.buffers.build([SequenceRows(_prompt(12, seed=6), 0, block_ids, "none")])
        runner.forward(batch, on_layers, per_group)
        assert seen == groups


def test_batch_layout() -> None:
    buffers = BatchBuffers(
        max_batch_tokens=16, max_batch_size=3, max_model_len=20, block_size=4, device=torch.device("cpu")
    )
    rows = [
        SequenceRows([11, 12, 13], 6, [7, 2, 5, 9], "all"),
        SequenceRows([21], 0, [3], "none"),
        SequenceRows([31, 32], 3, [1, 8], "last"),
    ]
    for _ in range(2):
        batch = buffers.build(rows)
        assert batch.token_ids.tolist() == [11, 12, 13, 21, 31, 32]
        assert batch.positions.tolist() == [6, 7, 8, 0, 3, 4]
        assert batch.slots.tolist() == [2 * 4 + 2, 2 * 4 + 3, 5 * 4, 3 * 4, 1 * 4 + 3, 8 * 4]
        assert batch.block_tables.shape == (3, 3)
        assert batch.block_tables[0].tolist() == [7, 2, 5]
        assert batch.block_tables[1, :1].tolist() == [3]
        assert batch.block_tables[2, :2].tolist() == [1, 8]
        assert batch.query_start.tolist() == [0, 3, 4, 6]
        assert batch.context_lens.tolist() == [9, 1, 5]
        assert batch.logit_rows.tolist() == [0, 1, 2, 5]
        assert batch.block_tables.stride(1) == 1
    assert buffers.build(rows[:1]).token_ids.data_ptr() == batch.token_ids.data_ptr()


@pytest.mark.parametrize(
    "rows",
    [
        [],
        [SequenceRows([], 0, [1])],
        [SequenceRows([1] * 17, 0, [1, 2, 3, 4, 5])],
        [SequenceRows([1], 20, [1, 2, 3, 4, 5, 6])],
        [SequenceRows([1], 4, [1])],
        [SequenceRows([1], 0, [1])] * 4,
    ],
    ids=["no rows", "no tokens", "too many tokens", "too long", "too few blocks", "too many sequences"],
)
def test_batches_beyond_the_buffers_are_our_own_bugs(rows: list[SequenceRows]) -> None:
    buffers = BatchBuffers(
        max_batch_tokens=16, max_batch_size=3, max_model_len=20, block_size=4, device=torch.device("cpu")
    )
    with pytest.raises(AssertionError):
        buffers.build(rows)


def test_sizes_of_the_pool(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    runner = _runner(path, num_blocks=None, kv_memory_bytes=1 << 20)
    block_bytes = 3 * 2 * 2 * 8 * 20 * 4
    assert runner.layout.block_bytes == block_bytes
    assert runner.num_blocks == (1 << 20) // block_bytes
    assert runner.kv.shape == (runner.num_blocks, 3, 2, 2, 8, 20)
    assert _runner(path, num_blocks=None, workers_on_host=1000).num_blocks >= 25
    assert _runner(path, num_blocks=7, max_model_len=None).max_model_len == 56
    assert _runner(path, max_model_len=None).max_model_len == 1600
    assert runner.fingerprint == _runner(path, dtype="bfloat16").fingerprint


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_model_len": 1601}, r"max_model_len = 1601 must be in 1\.\.1600"),
        ({"max_model_len": 0}, "max_model_len = 0"),
        ({"num_blocks": 24}, r"24 KV blocks hold 192 tokens, fewer than max_model_len = 200.*MiB"),
        ({"num_blocks": None, "kv_memory_bytes": 1000}, "hold 0 tokens"),
        ({"dtype": "int8"}, "dtype = 'int8'.*auto, float32, bfloat16, float16"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options: dict[str, object], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        _runner(write_checkpoint(tmp_path), **options)


def test_unknown_devices_are_refused(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path)
    for device in ("tpu", "meta", "nonsense:x"):
        with pytest.raises(ConfigError, match=r"device = .*supported: auto, cpu, cuda"):
            ModelRunner(path, device=device)
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="no CUDA device is visible"):
            ModelRunner(path, device="cuda")


def test_warm_up_reports_invariant_rows(tmp_path: Path) -> None:
    runner = _runner(write_checkpoint(tmp_path, "qwen2", dtype="bfloat16"))
    assert runner.warm_up() is True


def test_kernels_that_compute_something_else_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_checkpoint(tmp_path, "llama-gqa-bias")
    runner = ModelRunner(folder, num_blocks=8, max_model_len=64)
    assert runner.warm_up()
    runner._model._decoder = None  # the path by single ops; for the other one see test_native_layers.py
    if ops.backend() == "reference":
        pytest.skip("no compiled kernels")
    attention = ops.paged_attention

    def wrong(*arguments: Any, **options: Any) -> torch.Tensor:
        result = attention(*arguments, **options)
        return result if ops.backend() == "reference" else result * 1.02

    monkeypatch.setattr(ops, "paged_attention", wrong)
    with pytest.raises(ConfigError, match="differ from the reference"):
        runner.warm_up()
