"""Fixtures of the kernel tests: every backend of this machine, uninitialised memory full of NaN.

Triton kernels are tested where they can run: tests that take `triton_device` make their tensors there, on "cuda" where
there is a GPU, else on "cpu", in Triton's interpreter. The interpreter must be chosen before triton's first import, so
`tests/conftest.py` does it (TRITON_INTERPRET=1), for the whole session. Two things follow:

- In the interpreter `tl.dot` of bf16 operands is wrong; kernels take a constexpr that is
  `baton.kernels.triton.device.INTERPRETED` and go to fp32 first.
- Nothing can be compiled in a process that interprets: even Triton's own library is Python there. Ahead-of-time
  compilation is therefore a child process without the variable, `python -m baton.kernels.triton.aot`, started once by
  `test_triton_compile.py`. A kernel takes part by `compile_cases` in its module and a line in `aot.MODULES`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from baton.kernels import ops

NATIVE_BACKENDS = [name for name in ops.available_backends() if name.startswith("cpu-")]


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """`torch.empty` gives NaN, so that an element that a kernel forgets shows; one thread unless a test says more."""
    genuine = torch.empty

    def poisoned(*args: Any, **kwargs: Any) -> torch.Tensor:
        tensor = genuine(*args, **kwargs)
        return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor.fill_(-1)

    monkeypatch.setattr(torch, "empty", poisoned)
    torch.manual_seed(0)
    ops.set_num_threads(1)
    yield
    ops.set_num_threads(1)


@pytest.fixture(params=NATIVE_BACKENDS or [pytest.param("none", marks=pytest.mark.skip(reason="no C++ kernels built"))])
def native(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each C++ backend that this processor runs, active."""
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture(params=[*NATIVE_BACKENDS, "reference"])
def any_backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend for CPU tensors, the reference included, active."""
    with ops.use_backend(request.param):
        yield request.param


@pytest.fixture(scope="session")
def triton_device() -> torch.device:
    """Where Triton kernels run here."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def triton_backend(triton_device: torch.device) -> Iterator[torch.device]:
    """Triton active, for tensors on the device that it gives."""
    with ops.use_backend("triton"):
        yield triton_device
