"""bench/engine.py, its parts and the exactness run on a CPU, with tiny shapes."""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import engine
import gpu_exact
import gpu_steps
from baton.engine.engine import Engine
from gpu_model import LLAMA_3_8B, SMALL, make_engine, random_weights, write_folder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    """An engine of random weights with room for 40 blocks."""
    folder = write_folder(tmp_path_factory.mktemp("model"), SMALL)
    with random_weights():
        made = make_engine(
            folder, device="cpu", num_blocks=40, max_batch_tokens=32, max_batch_size=4, max_model_len=200
        )
    made.runner.kv.normal_()
    return made


def test_a_folder_of_llama_3_8b_takes_no_disk(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, LLAMA_3_8B)
    size = (folder / "model.safetensors").stat()
    assert size.st_size > 16_000_000_000
    assert size.st_blocks * 512 < 1 << 20
    from baton.engine.checkpoint import Checkpoint
    from baton.engine.model_config import ModelConfig
    from baton.engine.weights import expected_tensors

    Checkpoint.from_dir(folder).verify(expected_tensors(ModelConfig.from_dir(folder)))


def test_weights_are_random_and_not_read(small: Engine) -> None:
    runner: Any = small.runner
    norm = runner._model._weights.layers[0].input_norm.float()
    assert 0.9 < float(norm.mean()) < 1.1
    assert float(norm.std()) > 0
    assert gpu_steps.prefill(small, 50, CPU, repeats=1) > 0


def test_contexts_are_attached_and_not_computed(small: Engine) -> None:
    assert gpu_steps.attached(small, 3, 40, 60) == 0
    running = small.scheduler.running
    assert [seq.num_prompt for seq in running] == [40, 40, 40]
    assert all(seq.num_computed >= 40 for seq in running)
    gpu_steps.clear(small)
    counts = small.pool.counts()
    assert (counts.free, counts.owned) == (40, 0)


def test_contexts_that_do_not_fit_share_a_prefix(small: Engine) -> None:
    shared = gpu_steps.attached(small, 4, 150, 30)
    assert 0 < shared < 150
    first = {tuple(seq.block_ids[: shared // 16]) for seq in small.scheduler.running}
    assert len(first) == 1
    gpu_steps.clear(small)
    with pytest.raises(MemoryError, match="4 x 40 tokens do not fit 40 blocks"):
        gpu_steps.attached(small, 4, 40, 600)
    gpu_steps.clear(small)


def test_a_decode_step_counts_its_tokens(small: Engine) -> None:
    step_s, host_s, shared = gpu_steps.decode(small, 2, 30, 5, CPU)
    assert step_s > 0
    assert host_s > 0
    assert shared == 0


def test_waiting_for_the_device_is_no_work_of_the_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    def spin(*_: object) -> None:
        end_s = time.thread_time() + 0.05
        while time.thread_time() < end_s:
            pass

    monkeypatch.setattr(torch.cuda.Event, "synchronize", spin)
    clock = gpu_steps.HostClock()
    with clock.running():
        begin_s, all_s = clock.now_s(), time.thread_time()
        torch.cuda.Event.synchronize(None)  # type: ignore[arg-type]
        assert time.thread_time() - all_s >= 0.05
        assert clock.now_s() - begin_s < 0.04
    assert torch.cuda.Event.synchronize is spin


def test_parts_append_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine.csv"
    parts = "steps,handover,transformers,vllm"
    assert engine.main(["--device", "cpu", "--csv", str(path), "--parts", parts, "--budget-s", "240"]) == 0
    with path.open(newline="") as file:
        kinds = [row["kind"] for row in csv.DictReader(file)]
    for kind in ("decode", "prefill", "raw shm", "handover shm", "transformers decode", "transformers prefill"):
        assert kinds.count(kind) == 2
    assert "handover shm" in capsys.readouterr().out


def test_a_part_that_fails_does_not_hide_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def commands(device: str, out: Path, small: bool) -> dict[str, list[str]]:
        write = f"import json, pathlib; pathlib.Path({str(out)!r}).write_text(json.dumps([{{'kind': 'decode'}}]))"
        return {
            "steps": ["-c", "print('no memory'); raise SystemExit(3)"],
            "handover": ["-c", "import time; time.sleep(60)"],
            "transformers": ["-c", write],
        }

    monkeypatch.setattr(engine, "commands", commands)
    path = tmp_path / "engine.csv"
    arguments = ["--device", "cpu", "--csv", str(path), "--parts", "steps,handover,transformers", "--budget-s", "11"]
    assert engine.main(arguments) == 1
    said = capsys.readouterr().out
    assert "steps FAILED: ended with code 3: no memory" in said
    assert "handover FAILED: not done within" in said
    assert path.read_text().splitlines()[1].endswith(",decode,,,,,,,,,,,,,,")


def test_the_floor_of_a_handover_counts_each_byte_four_times() -> None:
    found = [{"transport": "cuda_ipc", "num_bytes": 1 << 20, "raw_s": 1e-3, "handover_s": 2e-3}]
    raw, handover = engine.handover_rows(found, copy_bytes_s=float(8 << 30))
    assert raw["copy_share"] == pytest.approx(4 * (1 << 20) / 1e-3 / (8 << 30))
    assert handover["gb_s"] == pytest.approx(0.524288)


# -------------------------------------------------------------------- exactness


def test_tokens_are_right_and_equal_over_a_handover(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["x", "--device", "cpu", "--models", "random", "--dtypes", "float32", "--prompts", "4", "--tokens", "5"]
    monkeypatch.setattr(sys, "argv", arguments)
    assert gpu_exact.main() == 0
    said = capsys.readouterr().out
    assert "no wrong token" in said
    assert "local, by shm" in said


class _Liar:
    """Gives token 1 as its first choice, token 2 nearly, all others far below."""

    device = CPU

    def __call__(self, ids: torch.Tensor) -> Any:
        logits = torch.zeros(1, ids.shape[1], 50)
        logits[..., 1], logits[..., 2] = 10.0, 9.9999
        return type("Output", (), {"logits": logits})


def test_ties_are_told_from_wrong_tokens() -> None:
    verdict = gpu_exact.judge(_Liar(), [3, 4], [1, 2, 5, 1], tie=1e-3)
    assert (verdict.equal, verdict.ties, verdict.wrong) == (2, 1, 1)
