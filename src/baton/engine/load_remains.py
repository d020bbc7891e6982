"""What loading a model took beyond what steps need, and gives back: memory, and torch's threads."""

from __future__ import annotations

import torch

from baton.engine.host_memory import release_freed_memory
from baton.kernels import ops

__all__ = ["give_back_load_remains"]


def give_back_load_remains() -> None:
    """To be called once the model is loaded, before the threads that make steps are started."""
    release_freed_memory()
    if ops.backend() != "reference":
        # Torch's own team would compete with the kernels' threads for the same cores, and of a step only small copies
        # are left to it. Threads that start from now on take this number.
        torch.set_num_threads(1)
