"""Checkpoints: shards, conversion, and every kind of damage named with its file and tensor."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from model_factory import write_checkpoint
from torch import Tensor

from baton.engine.checkpoint import Checkpoint
from baton.engine.runner import ModelRunner, SequenceRows
from baton.errors import CheckpointError

_DOWN = "model.layers.1.mlp.down_proj.weight"


def _load(path: Path, **options: object) -> ModelRunner:
    return ModelRunner(path, device="cpu", num_blocks=100, **options)  # type: ignore[arg-type]


def _logits(runner: ModelRunner) -> Tensor:
    return runner.forward(runner.buffers.build([SequenceRows([5, 6, 7], 0, [3], "all")])).clone()


def _edit(path: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    file = path / "model.safetensors"
    tensors = safetensors.torch.load_file(file)
    change(tensors)
    safetensors.torch.save_file(tensors, file)


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path, "llama-gqa-bias", num_hidden_layers=2)


def test_shards_equal_a_single_file(checkpoint: Path, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", num_hidden_layers=2, max_shard_size="60KB")
    assert len(list(sharded.glob("*.safetensors"))) >= 3
    assert torch.equal(_logits(_load(sharded)), _logits(_load(checkpoint)))


def test_progress_reaches_the_total(checkpoint: Path) -> None:
    calls: list[tuple[int, int, str]] = []
    runner = _load(checkpoint, progress=lambda done, total, name: calls.append((done, total, name)))
    assert [done for done, _, _ in calls] == sorted(done for done, _, _ in calls)
    assert calls[-1][:2] == (runner.weight_bytes, runner.weight_bytes)
    assert _DOWN in {name for _, _, name in calls}


def test_weights_are_converted_to_the_dtype_asked_for(checkpoint: Path) -> None:
    runner = _load(checkpoint, dtype="bfloat16")
    assert runner.kv.dtype is torch.bfloat16
    torch.testing.assert_close(_logits(runner), _logits(_load(checkpoint)), atol=0.3, rtol=0.1)


def test_dtype_falls_back_to_that_of_the_weights(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text())
    del config["dtype"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert _load(checkpoint).dtype is torch.float32


def test_stored_rotary_frequencies_are_allowed(checkpoint: Path) -> None:
    _edit(checkpoint, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(10)}))
    _load(checkpoint)


def test_a_stored_tied_head_must_equal_the_embedding(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-mha-tied")
    embed = safetensors.torch.load_file(path / "model.safetensors")["model.embed_tokens.weight"]
    _edit(path, lambda tensors: tensors.update({"lm_head.weight": embed.clone()}))
    _load(path)
    _edit(path, lambda tensors: tensors.update({"lm_head.weight": embed + 1}))
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        _load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: tensors.pop(_DOWN), rf"{_DOWN} \[40, 88\] is missing"),
        (lambda tensors: tensors.pop("lm_head.weight"), r"lm_head\.weight .* is missing"),
        (
            lambda tensors: tensors.update({"model.extra": torch.ones(2)}),
            r"model\.safetensors: .*model\.extra \[2\] is",
        ),
        (lambda tensors: tensors.update({_DOWN: torch.ones(88, 40)}), rf"{_DOWN} has shape \[88, 40\].*\[40, 88\]"),
        (lambda tensors: tensors.update({_DOWN: tensors[_DOWN].to(torch.int8)}), rf"{_DOWN} is of type I8.*BF16"),
    ],
    ids=["missing", "missing head", "unexpected", "shape", "type"],
)
def test_wrong_tensors_are_named(checkpoint: Path, change: Callable[[dict[str, Tensor]], object], message: str) -> None:
    _edit(checkpoint, change)
    with pytest.raises(CheckpointError, match=message):
        _load(checkpoint)


def test_damaged_files_are_named(checkpoint: Path) -> None:
    file = checkpoint / "model.safetensors"
    data = file.read_bytes()
    for size, message in (
        (len(data) - 4, r"model\.safetensors is truncated: tensor \S+ ends at byte"),
        (100, r"model\.safetensors is truncated or damaged"),
        (0, r"model\.safetensors is truncated or damaged"),
    ):
        file.write_bytes(data[:size])
        with pytest.raises(CheckpointError, match=message):
            _load(checkpoint)
    file.write_bytes(data[:8] + b"x" + data[9:])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged: its safetensors header"):
        _load(checkpoint)


def test_missing_files_are_named(checkpoint: Path, tmp_path: Path) -> None:
    sharded = write_checkpoint(tmp_path / "sharded", num_hidden_layers=2, max_shard_size="60KB")
    shard = sorted(sharded.glob("*.safetensors"))[1]
    index_file = sharded / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    moved = next(name for name, file in index["weight_map"].items() if file != shard.name)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], moved: shard.name}}))
    with pytest.raises(CheckpointError, match=f"{shard.name}: tensor {moved} is missing"):
        _load(sharded)
    index_file.write_text(json.dumps({"weight_map": {**index["weight_map"], moved: "../../x.safetensors"}}))
    with pytest.raises(CheckpointError, match="must be a plain file name"):
        _load(sharded)
    index_file.write_text(json.dumps(index))
    shard.unlink()
    with pytest.raises(CheckpointError, match=f"{shard.name} is missing"):
        _load(sharded)
    index_file.write_text("[]")
    with pytest.raises(CheckpointError, match=r"index\.json is damaged"):
        _load(sharded)
    (checkpoint / "model.safetensors").rename(checkpoint / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin is a pickle"):
        _load(checkpoint)


def test_digest_tells_weights_apart(checkpoint: Path, tmp_path: Path) -> None:
    digest = Checkpoint.from_dir(checkpoint).digest()
    same = write_checkpoint(tmp_path / "same", num_hidden_layers=2)
    other = write_checkpoint(tmp_path / "other", num_hidden_layers=2, seed=1)
    assert Checkpoint.from_dir(same).digest() == digest
    assert Checkpoint.from_dir(other).digest() != digest


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_quantized_weights_are_near_and_have_a_fingerprint_of_their_own(quantization: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-gqa-bias", num_hidden_layers=2)
    exact, rounded = _load(path, dtype="bfloat16"), _load(path, dtype="bfloat16", quantization=quantization)
    assert rounded.fingerprint != exact.fingerprint
    expected, actual = _logits(exact), _logits(rounded)
    assert not torch.equal(actual, expected)
    error = (actual - expected).norm() / expected.norm()
    assert error < (0.05 if quantization == "int8" else 0.5)
    assert rounded.warm_up()
