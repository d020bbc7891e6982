"""Which GPU each rank of this host computes on. Free of torch, decided before a rank starts.

Ranks of all workers take the GPUs in turn, so the ranks of one instance have GPUs of their own where there are enough;
with fewer GPUs than ranks, some share one, each with its part of the memory (`gpu.memory_fraction`).

A rank is told by the order of CUDA_VISIBLE_DEVICES: its own GPU comes first, so that it is `cuda:0` to every thread and
library; the others stay visible, since pages go from GPU to GPU of a host through memory that both processes see.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from baton.config import ClusterConfig

__all__ = ["gpu_environment", "gpu_index", "visible_gpus"]

_VARIABLE = "CUDA_VISIBLE_DEVICES"
_GROUPS = ("prefill", "decode")
_DEVICE_FILE = re.compile(r"nvidia\d+")


def visible_gpus(environment: Mapping[str, str], devices: Path = Path("/dev")) -> tuple[str, ...]:
    """Names of the GPUs that this process may use, as CUDA_VISIBLE_DEVICES writes them: those it lists, else all."""
    if _VARIABLE in environment:
        names = [name.strip() for name in environment[_VARIABLE].split(",")]
        # CUDA reads the list up to the first name that it does not know; -1 says that there are none.
        end = next((at for at, name in enumerate(names) if not name or name.startswith("-")), len(names))
        return tuple(names[:end])
    count = sum(1 for path in devices.glob("nvidia*") if _DEVICE_FILE.fullmatch(path.name))
    return tuple(map(str, range(count)))


def gpu_index(config: ClusterConfig, role: str, index: int, rank: int, num_gpus: int) -> int:
    """Which of `num_gpus` GPUs a rank gets that runs on this host, like all others.

    Args:
        index: of the instance within its role.
    """
    assert num_gpus >= 1
    before = 0 if role == "prefill" else config.prefill.replicas * config.num_ranks_of("prefill")
    assert role in _GROUPS, role
    return (before + index * config.num_ranks_of(role) + rank) % num_gpus


def gpu_environment(config: ClusterConfig, role: str, index: int, rank: int, gpus: Sequence[str]) -> dict[str, str]:
    """What a rank's environment says of GPUs; nothing where it needs none or there is but one."""
    if role not in _GROUPS or config.device == "cpu" or len(gpus) < 2:
        return {}
    own = gpu_index(config, role, index, rank, len(gpus))
    return {_VARIABLE: ",".join([gpus[own], *gpus[:own], *gpus[own + 1 :]])}
