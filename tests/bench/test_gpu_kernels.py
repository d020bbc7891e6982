"""bench/kernels.py on a CPU: every case runs, and a kernel that is wrong gets no speed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest
import torch

import gpu_cases
import gpu_kernels
from baton.kernels import ops

CPU = torch.device("cpu")


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_every_case_runs_and_every_kernel_has_a_check() -> None:
    cases = list(gpu_cases.cases(gpu_cases.SMALL, torch.bfloat16, CPU))
    assert {case.op for case in cases} - {"linear"} <= set(gpu_cases.CHECKS)
    assert len({(case.op, case.config) for case in cases}) == len(cases), "one row per case"
    for case in cases:
        assert case.num_bytes > 0
        assert case.bound == "memory" or case.flops > 0
        case.make()()


def test_the_cases_of_a_gpu_are_those_that_were_asked_for() -> None:
    cases = list(gpu_cases.cases(gpu_cases.FULL, torch.bfloat16, CPU))
    configs = {case.config for case in cases if case.op == "paged_attention"}
    assert {"decode batch 1 context 131072", "decode batch 256 context 4096", "prefill 32768"} <= configs
    assert all(case.num_bytes < 64 << 30 for case in cases)
    norms = [case.num_bytes for case in cases if case.op == "rms_norm"]
    assert max(norms) >= 128 << 20, "far beyond a cache"
    eight_k = next(case for case in cases if case.config == "prefill 8192")
    assert eight_k.flops == 4 * 128 * 32 * (8192 * 8193 // 2)


@pytest.mark.parametrize("op", gpu_cases.CHECKS)
def test_checks_pass_on_this_device(op: str) -> None:
    assert gpu_cases.CHECKS[op](CPU) == ""


def test_speeds_are_appended_and_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.csv"
    assert gpu_kernels.main(["--device", "cpu", "--only", "rms_norm,paged_attention", "--csv", str(path)]) == 0
    rows = rows_of(path)
    assert {row["op"] for row in rows} == {"rms_norm", "paged_attention"}
    for row in rows:
        assert float(row["us"]) > 0
        is_compute_bound = row["config"].startswith("prefill")
        assert bool(row["matmul_share"]) == is_compute_bound
        assert bool(row["copy_share"]) != is_compute_bound
    assert "rms_norm" in capsys.readouterr().out


def test_a_kernel_whose_tests_failed_gets_no_speed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "kernels.csv"
    arguments = ["--device", "cpu", "--only", "rms_norm,silu_mul", "--failed", "rms_norm", "--csv", str(path)]
    assert gpu_kernels.main(arguments) == 1
    assert {row["op"] for row in rows_of(path)} == {"silu_mul"}
    assert "NO SPEED of rms_norm: its tests failed" in capsys.readouterr().out


def test_a_kernel_that_is_wrong_gets_no_speed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = ops.silu_mul

    def wrong(gate_up: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        result = right(gate_up, out)
        result[-1, -1] = float("nan")
        return result

    monkeypatch.setattr(ops, "silu_mul", wrong)
    path = tmp_path / "kernels.csv"
    assert gpu_kernels.main(["--device", "cpu", "--only", "rms_norm,silu_mul", "--csv", str(path)]) == 1
    assert {row["op"] for row in rows_of(path)} == {"rms_norm"}
    assert "NO SPEED of silu_mul: silu_mul of torch.float32: off by nan" in capsys.readouterr().out


def test_a_kernel_that_breaks_while_it_is_measured_keeps_no_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right, calls = ops.rms_norm, 0

    def breaks(*arguments: Any, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        if calls > 20:
            raise RuntimeError("an illegal memory access")
        return right(*arguments, **options)

    monkeypatch.setattr(ops, "rms_norm", breaks)
    path = tmp_path / "kernels.csv"
    assert gpu_kernels.main(["--device", "cpu", "--only", "rms_norm,checksum", "--csv", str(path)]) == 1
    assert {row["op"] for row in rows_of(path)} == {"checksum"}
    assert "an illegal memory access" in capsys.readouterr().out


def test_cases_beyond_the_budget_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--device", "cpu", "--only", "checksum", "--budget-s", "0", "--csv", str(tmp_path / "x.csv")]
    assert gpu_kernels.main(arguments) == 0
    assert "1 cases left out: the budget of 0 s was over" in capsys.readouterr().out


def test_an_unknown_kernel_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_kernels.main(["--device", "cpu", "--only", "nothing"])
    assert "no cases of nothing" in capsys.readouterr().err
