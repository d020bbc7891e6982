"""Before any test imports triton: without a GPU its kernels run in its interpreter. And what tests of any room use."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from collections.abc import Iterator

import pytest


def _has_gpu() -> bool:
    try:
        ctypes.CDLL("libcuda.so.1")
    except OSError:
        return False
    import torch

    return torch.cuda.is_available()


# Triton reads this when it is first imported, and other tests import it by way of transformers while pytest collects.
if not _has_gpu():
    os.environ.setdefault("TRITON_INTERPRET", "1")


# An example may come to stand still with the whole machine: that is no finding.
with contextlib.suppress(ImportError):  # not every machine with a GPU has it
    from hypothesis import HealthCheck, settings

    settings.register_profile("baton", deadline=None, suppress_health_check=[HealthCheck.too_slow])
    settings.load_profile("baton")


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Within the test nothing is let go of by Python's cycle collector."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
