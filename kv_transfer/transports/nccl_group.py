"""A process group of two ranks over NCCL, as a link uses it: how it is made, and what it says of itself."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch.distributed

from baton.kv_transfer.transports.cuda_device import CudaDevice

__all__ = ["MakeGroup", "WorkQuery", "failure_of", "make_nccl_group", "nccl_version"]

# The type stubs of torch know neither NCCL's options nor its versions.
_dist: Any = torch.distributed

_MAX_CTAS = 4

# (device, store, rank) -> process group of two ranks on the device.
MakeGroup = Callable[[CudaDevice, Any, int], Any]

# Read by each group as it is made: no watchdog that ends the process, no warning about what is meant so.
_GROUP_ENVIRONMENT = {
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "0",
    "TORCH_NCCL_ENABLE_MONITORING": "0",
    "TORCH_NCCL_SHOW_EAGER_INIT_P2P_SERIALIZATION_WARNING": "0",
}
_environment_lock = threading.Lock()


def make_nccl_group(device: CudaDevice, store: Any, rank: int) -> Any:
    """A small communicator with one peer, on a stream of normal priority, connected at once."""
    options = _dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = False
    options._timeout = timedelta(days=1)
    # Calls return while NCCL works on them, which is what makes an abort possible.
    options.config.blocking = 0
    options.config.min_ctas = 1
    options.config.max_ctas = _MAX_CTAS
    with _environment_lock, _environment(_GROUP_ENVIRONMENT):
        group = _dist.ProcessGroupNCCL(store, rank, 2, options)
    # Without this the first transfer would make a second communicator for the same pair.
    group.eager_connect_single_device(device.torch_device)
    return group


def nccl_version() -> str:
    """Of the library that runs."""
    return ".".join(map(str, _dist.ProcessGroupNCCL.get_runtime_nccl_version()))


class WorkQuery:
    """A work as `has_ended` asks it."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def query(self) -> bool:
        return bool(self._work.is_completed())


def failure_of(group: Any) -> str:
    """What went wrong with a group, as far as it knows; "" for nothing.

    A failed work counts as completed. Asking the work itself would throw, but also abort the communicator on this very
    thread, which may hang; what a failure has left in a payload is found by its checksum.
    """
    if group is None:
        return "the communicator is aborted"
    error = group.get_error().name
    return "" if error == "SUCCESS" else f"NCCL reports {error}"


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
