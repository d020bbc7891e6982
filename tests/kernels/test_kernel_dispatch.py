"""Which backend takes which tensors, and what importing the kernels costs."""

from __future__ import annotations

import os
import subprocess
import sys

import torch

from baton.kernels import ops
from baton.kernels.backends import library_for, uses_triton


def run(script: str, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**{k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_triton_is_not_loaded_before_it_is_needed() -> None:
    script = """
import sys, torch
from baton.kernels import ops
ops.rms_norm(torch.ones(2, 8), torch.ones(8), 1e-5)
print("triton" in sys.modules)
"""
    assert run(script) == "False"


def test_triton_is_available_where_it_can_run() -> None:
    script = "from baton.kernels import ops; print('triton' in ops.available_backends(), ops.backend())"
    assert run(script, TRITON_INTERPRET="1", BATON_KERNELS="triton") == "True triton"
    can_run = str(torch.cuda.is_available())
    assert run(script, BATON_KERNELS="reference") == f"{can_run} reference"


def test_triton_without_gpu_or_interpreter_is_refused() -> None:
    script = """
from baton.kernels import ops
try:
    with ops.use_backend("triton"):
        pass
except ValueError as error:
    print(error)
"""
    assert "needs a GPU, or TRITON_INTERPRET=1" in run(script, CUDA_VISIBLE_DEVICES="")


def test_backends_take_the_tensors_that_they_can(triton_device: torch.device) -> None:
    on_cpu, on_device = torch.zeros(1), torch.zeros(1, device=triton_device)
    with ops.use_backend("triton"):
        assert uses_triton(on_device)
        assert library_for(on_device) is None
    with ops.use_backend("reference"):
        assert not uses_triton(on_device)
        assert library_for(on_cpu) is None
    assert uses_triton(on_device) == on_device.is_cuda
    assert not uses_triton(on_cpu)


def test_attention_goes_to_triton(triton_backend: torch.device) -> None:
    kv = torch.randn(4, 2, 2, 16, 32, device=triton_backend)
    q = torch.randn(5, 4, 32, device=triton_backend)
    where = (
        torch.tensor([[2, 0], [1, 3]], dtype=torch.int32, device=triton_backend),
        torch.tensor([0, 3, 5], dtype=torch.int32, device=triton_backend),
        torch.tensor([20, 7], dtype=torch.int32, device=triton_backend),
    )
    found = ops.paged_attention(q, kv, *where, scale=0.2)
    fixed = ops.paged_attention(q, kv, *where, scale=0.2, deterministic=True)
    with ops.use_backend("reference"):
        expected = ops.paged_attention(q, kv, *where, scale=0.2)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fixed, expected, atol=1e-5, rtol=1e-5)
