"""What a launch needs to know of the GPU, read once per device; on CPU, Triton's interpreter plays a small GPU."""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton

from baton.kernels.triton.launch_table import gpus_for

__all__ = ["INTERPRETED", "Gpu", "gpu_of"]

INTERPRETED: bool = triton.knobs.runtime.interpret
"""Whether kernels run in Triton's interpreter: TRITON_INTERPRET was set when triton was first imported."""

_INTERPRETER_SMS = 3


@dataclass(frozen=True, slots=True)
class Gpu:
    """Attributes:
    names: keys of the launch table, most particular first.
    capability: 10 * major + minor; 0 for the interpreter.
    num_sms: streaming multiprocessors.
    """

    names: tuple[str, ...]
    capability: int
    num_sms: int


@functools.cache
def gpu_of(device: torch.device) -> Gpu:
    """The GPU behind `device`.

    Raises:
        ValueError: it is no CUDA device, and there is no interpreter.
    """
    if INTERPRETED:
        return Gpu(names=("interpreter",), capability=0, num_sms=_INTERPRETER_SMS)
    if device.type != "cuda":
        raise ValueError(f"Triton kernels run on CUDA tensors, got one on {device}")
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    return Gpu(
        names=gpus_for(properties.name, capability), capability=capability, num_sms=properties.multi_processor_count
    )
