"""Choice of the backend, threads and forks."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from baton.kernels import ops
from baton.kernels.cpu import library


def test_the_fastest_built_backend_is_chosen() -> None:
    fastest = next(name for name in ops.available_backends() if name != "triton")
    assert ops.backend() == os.environ.get("BATON_KERNELS", fastest)


def test_use_backend_restores_and_refuses() -> None:
    before = ops.backend()
    with ops.use_backend("reference"):
        assert ops.backend() == "reference"
    assert ops.backend() == before
    with pytest.raises(ValueError, match=r"cpu-nonsense.*available"), ops.use_backend("cpu-nonsense"):
        pass


def test_environment_chooses_the_backend() -> None:
    script = "from baton.kernels import ops; print(ops.backend())"
    environment = {**os.environ, "BATON_KERNELS": "reference"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == "reference"


def test_missing_and_damaged_libraries_fall_back_with_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(library, "_FOLDER", tmp_path)
    library.available.cache_clear()
    library.load.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert library.load_best() is None
            (tmp_path / f"_cpu_generic{library.importlib.machinery.EXTENSION_SUFFIXES[0]}").write_bytes(
                b"not a library"
            )
            library.available.cache_clear()
            assert library.load_best() is None
        assert len(caplog.records) == 2
        assert "no _cpu_* library" in caplog.text
        assert "_cpu_generic" in caplog.records[1].getMessage()
    finally:
        library.available.cache_clear()
        library.load.cache_clear()


def test_calls_from_many_threads_at_once(native: str) -> None:
    ops.set_num_threads(2)
    x, weight = torch.randn(200, 1024), torch.randn(1024)
    expected = ops.rms_norm(x, weight, 1e-5)
    right: list[bool] = []

    def work() -> None:
        right.extend(torch.equal(ops.rms_norm(x, weight, 1e-5), expected) for _ in range(30))

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    assert right == [True] * 120


def test_a_forked_child_makes_its_own_threads() -> None:
    script = """
import os, torch
torch.set_num_threads(1)
from baton.kernels import ops
ops.set_num_threads(3)
x, weight = torch.randn(400, 1024), torch.randn(1024)
expected = ops.rms_norm(x, weight, 1e-5)
child = os.fork()
same = torch.equal(ops.rms_norm(x, weight, 1e-5), expected)
if child == 0:
    os._exit(0 if same else 1)
assert os.waitpid(child, 0)[1] == 0 and same
"""
    subprocess.run([sys.executable, "-c", script], timeout=60, check=True)


@pytest.mark.parametrize("num_threads", [0, -1, 1000])
def test_thread_counts_are_limited(num_threads: int) -> None:
    with pytest.raises(ValueError, match="num_threads"):
        ops.set_num_threads(num_threads)
