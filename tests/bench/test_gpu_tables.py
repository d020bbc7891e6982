"""Rows of GPU benchmarks: CSV files that keep their columns, and tables."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

import gpu_rows
from gpu_device import Machine, Timer, describe, measure_roof

CPU = torch.device("cpu")
MACHINE = Machine(date="2026-11-21T12:00:00+00:00", gpu="H", driver="1", torch="2.11.0", triton="3.6.0", revision="abc")


def test_rows_are_appended_behind_the_machine(tmp_path: Path) -> None:
    path = tmp_path / "docs" / "rows.csv"
    gpu_rows.append(path, MACHINE, ("op", "us", "note"), [{"op": "norm", "us": 12.34567}])
    gpu_rows.append(path, MACHINE, ("op", "us", "note"), [{"op": "rope", "us": 3, "note": "a, b"}])
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["gpu"], row["revision"], row["op"], row["us"], row["note"]) for row in rows] == [
        ("H", "abc", "norm", "12.35", ""),
        ("H", "abc", "rope", "3", "a, b"),
    ]
    assert gpu_rows.latest(path, "2026-11-21T12:00:00+00:00") == rows
    assert gpu_rows.latest(path, "2026-11-21T12:00:01+00:00") == []
    assert gpu_rows.latest(tmp_path / "none.csv", "") == []


def test_a_file_of_other_columns_is_left_as_it_is(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    gpu_rows.append(path, MACHINE, ("op",), [{"op": "norm"}])
    before = path.read_text()
    with pytest.raises(ValueError, match=r"has the columns .*op; these rows have .*op, us"):
        gpu_rows.append(path, MACHINE, ("op", "us"), [{"op": "norm", "us": 1}])
    with pytest.raises(ValueError, match="gb_s"):
        gpu_rows.append(path, MACHINE, ("op",), [{"op": "norm"}, {"op": "rope", "gb_s": 1.0}])
    assert path.read_text() == before


def test_a_table_has_numbers_to_the_right() -> None:
    text = gpu_rows.table(("op", "us"), [{"op": "norm", "us": 1.5}, {"op": "rope_and_cache"}])
    assert text.splitlines() == ["op               us", "norm            1.5", "rope_and_cache"]


def test_the_committed_tables_have_the_columns_of_their_writers() -> None:
    import engine
    import gpu_kernels

    for path, columns in ((gpu_kernels.CSV, gpu_kernels.COLUMNS), (engine.CSV, engine.COLUMNS)):
        with path.open(newline="") as file:
            assert next(csv.reader(file)) == ["date", "gpu", "driver", "torch", "triton", "revision", *columns]


def test_a_machine_and_its_roof_are_told_without_a_gpu() -> None:
    machine = describe(CPU)
    assert machine.gpu == "cpu"
    assert machine.torch == torch.__version__
    roof = measure_roof(Timer(CPU, budget_s=0.0), CPU)
    assert roof.copy_bytes_s > 0
    assert roof.matmul_flops_s > 0


class _Device:
    """A clock that events read: each flush takes 5 ms, each call 2 ms."""

    def __init__(self) -> None:
        self.now_ms = 0.0
        self.done: list[str] = []

    def event(self, *, enable_timing: bool) -> _Event:
        assert enable_timing
        return _Event(self)

    def sleep(self, cycles: int) -> None:
        self.done.append("sleep")
        self.now_ms += cycles / 2e6

    def zero_(self) -> None:
        self.done.append("flush")
        self.now_ms += 5.0

    def call(self) -> None:
        self.done.append("call")
        self.now_ms += 2.0


class _Event:
    def __init__(self, device: _Device) -> None:
        self._device = device
        self._at_ms = 0.0

    def record(self) -> None:
        self._at_ms = self._device.now_ms

    def elapsed_time(self, end: _Event) -> float:
        return end._at_ms - self._at_ms


def test_device_time_is_that_of_the_call_behind_a_busy_device_and_a_cold_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    device = _Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda _: None)
    timer = Timer(CPU, budget_s=1.0)
    timer._flush = device  # type: ignore[assignment]
    timing = timer.time(device.call)
    assert timing.device_s == pytest.approx(2e-3)
    assert timing.repeats == 30
    assert device.done[:3] == ["call"] * 3, "compiled and warm before it is measured"
    assert device.done[3:] == ["sleep", "flush", "call"] * 30


def test_calls_are_repeated_at_least_three_times_after_warming_up() -> None:
    calls: list[int] = []
    timing = Timer(CPU, budget_s=0.0).time(lambda: calls.append(1))
    assert timing.repeats == 3
    assert len(calls) == 5
