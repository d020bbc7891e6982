"""The transports of a worker, made from its configuration, and what this host offers. Loads torch only when asked to.

A transport that cannot work here at all (no GPU, pool on the CPU) is left out with a warning; one that cannot be set up
with a certain peer is skipped when the link is made (`choice.py`, `failures.py`).
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from baton import faults
from baton.errors import ConfigError
from baton.kv_transfer.transports.arena import DEFAULT_ARENA_BYTES
from baton.kv_transfer.transports.choice import GPU_ONLY, TRANSPORT_NAMES, candidates, preference

if TYPE_CHECKING:
    from baton.kv_transfer.transports.base import Transport

__all__ = ["TRANSPORT_NAMES", "available", "candidates", "host_id", "make_transports"]

_log = logging.getLogger(__name__)
_SHARED_MEMORY = Path("/dev/shm")


def make_transports(
    choice: str | Sequence[str] = "auto",
    *,
    host: str = "127.0.0.1",
    arena_bytes: int = DEFAULT_ARENA_BYTES,
    rate_limit_gbit_s: float | None = None,
    device: str = "cpu",
) -> tuple[Transport, ...]:
    """The transports of a worker, best first, by `transfer.transport` of the configuration.

    Args:
        choice: "auto", a name, or names in order of preference.
        host: this host's address as peers reach it.
        arena_bytes: staging memory per link on the sender.
        rate_limit_gbit_s: what gloo receives at most, all links together; None for no limit.
        device: of the KV pool, as torch writes it: "cpu", "cuda", "cuda:1".

    Raises:
        ConfigError: unknown name, or none of those chosen can work here; the text says why for each.
    """
    names = preference(choice)
    missing = available()
    if not device.startswith("cuda"):
        missing |= dict.fromkeys(GPU_ONLY, f"the KV pool is on {device}, not on a GPU")
    usable = tuple(name for name in names if not missing[name])
    reasons = "; ".join(f"{name}: {missing[name]}" for name in names if missing[name])
    if not usable:
        raise ConfigError(f"transfer.transport is {choice!r}, and nothing of that works here: {reasons}")
    if choice != "auto" and reasons:
        _log.warning("transports left out: %s", reasons)
    limit = None if rate_limit_gbit_s is None else rate_limit_gbit_s * 1e9 / 8
    made = tuple(_make(name, host, arena_bytes, limit, device) for name in usable)
    if not faults.is_possible:
        return made
    from baton.kv_transfer.transports.faulty import FaultyTransport

    return tuple(FaultyTransport(transport) for transport in made)


def _make(name: str, host: str, arena_bytes: int, rate_limit_bytes_s: float | None, device: str) -> Transport:
    match name:
        case "shm":
            from baton.kv_transfer.transports.shm import ShmTransport

            return ShmTransport(arena_bytes=arena_bytes)
        case "gloo":
            from baton.kv_transfer.transports.gloo import GlooTransport

            return GlooTransport(host=host, arena_bytes=arena_bytes, rate_limit_bytes_s=rate_limit_bytes_s)
        case "cuda_ipc":
            from baton.kv_transfer.transports.cuda_device import CudaDevice
            from baton.kv_transfer.transports.cuda_ipc import CudaIpcTransport

            return CudaIpcTransport(CudaDevice.of(device), arena_bytes=arena_bytes)
        case "nccl":
            from baton.kv_transfer.transports.cuda_device import CudaDevice
            from baton.kv_transfer.transports.nccl import NcclTransport

            return NcclTransport(CudaDevice.of(device), host=host, arena_bytes=arena_bytes)
    raise AssertionError(f"no transport is called {name}")


def available() -> dict[str, str]:
    """Every transport by name, with the reason why it cannot work on this host, or "" where it can.

    Loads torch, which takes a second or two, only where there may be a GPU.
    """
    has_torch = importlib.util.find_spec("torch") is not None
    gpu = _why_no_gpu() if has_torch else ""
    reasons = {
        "cuda_ipc": gpu,
        "nccl": gpu or (_why_no_nccl() if has_torch else ""),
        "shm": "" if os.access(_SHARED_MEMORY, os.W_OK | os.X_OK) else f"{_SHARED_MEMORY} cannot be written to",
        "gloo": "",
    }
    return {name: reasons[name] if has_torch else "torch is not installed" for name in TRANSPORT_NAMES}


def _why_no_gpu() -> str:
    if not Path("/dev/nvidiactl").exists() and not Path("/dev/dxg").exists():
        return "no NVIDIA GPU on this host"
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    return "" if torch.cuda.is_available() else "torch sees no GPU: look at the driver and at CUDA_VISIBLE_DEVICES"


def _why_no_nccl() -> str:
    import torch.distributed

    return "" if torch.distributed.is_nccl_available() else "torch is built without NCCL"


def host_id() -> str:
    """Equal for two processes that share a kernel and its `/dev/shm`, hence not for two containers without it."""
    boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return hashlib.sha256(f"{boot_id}/{os.stat(_SHARED_MEMORY).st_dev}/{os.getuid()}".encode()).hexdigest()[:16]
