"""Makes the harness importable; fixtures of tests whose ranks are threads of this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tests.engine.model_factory import write_checkpoint

from baton.engine.runner import ModelRunner

sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture(scope="package")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with four query heads, two KV heads and three layers."""
    return write_checkpoint(tmp_path_factory.mktemp("model"), "llama-gqa-bias")


@pytest.fixture
def ranks_in_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """At warm-up a rank switches the kernels' back end for a moment, for all threads: not while others compute."""
    monkeypatch.setattr(ModelRunner, "warm_up", lambda runner: len(runner._probe()) >= 0)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
