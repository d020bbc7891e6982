"""Host memory through which steps go to the device and their tokens come back: pinned on CUDA, one set per step.

    free --take--> written by the host --upload--> read by the device, tokens copied back --collect--> free

A set is free again when its step's tokens have been read, or when the step was given up; the host writes to no memory
that a copy on its way to the device still reads, and never waits to make sure of that.
"""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.errors import DeadlineError

__all__ = ["StepBuffers", "StepSet"]

_POLL_S = 20e-6


class StepSet:
    """One step's host memory.

    Attributes:
        words: int32, what goes to the device.
    """

    def __init__(self, num_words: int, max_rows: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        self._host = torch.zeros(num_words, dtype=torch.int32, pin_memory=is_cuda)
        self._tokens = torch.zeros(max_rows, dtype=torch.int64, pin_memory=is_cuda)
        self._device = device
        self._event: Any = torch.cuda.Event() if is_cuda else None
        self.words: npt.NDArray[np.int32] = self._host.numpy()

    def upload(self, to: Tensor, num_words: int) -> None:
        """Enqueues the copy of the first words: the one copy of a step."""
        to[:num_words].copy_(self._host[:num_words], non_blocking=True)

    def download(self, tokens: Tensor) -> None:
        """Enqueues the copy of a step's tokens, int64 [N], none at all too; `wait` tells when all of it is done."""
        self._tokens[: tokens.shape[0]].copy_(tokens, non_blocking=True)
        if self._event is not None:
            self._event.record(torch.cuda.current_stream(self._device))

    def wait(self, num_tokens: int, deadline_s: float) -> npt.NDArray[np.int64]:
        """The tokens, once they are here, and so everything that was enqueued before; valid until the next step's.

        Raises:
            DeadlineError: the device has not finished the step after `deadline_s`.
        """
        if self._event is not None and not self._event.query():
            end_s = time.monotonic() + deadline_s
            while not self._event.query():
                if time.monotonic() > end_s:
                    raise DeadlineError(f"{self._device} has not finished a step within {deadline_s:.0f} s: it hangs")
                time.sleep(_POLL_S)
        tokens: npt.NDArray[np.int64] = self._tokens[:num_tokens].numpy()
        return tokens


class StepBuffers:
    """As many sets as steps may be in flight.

    Args:
        num_words: of the largest step.
        max_rows: tokens drawn in a step, at most.
    """

    def __init__(self, num_sets: int, *, num_words: int, max_rows: int, device: torch.device) -> None:
        self._free = [StepSet(num_words, max_rows, device) for _ in range(num_sets)]

    def take(self) -> StepSet:
        """A free set."""
        assert self._free, "more steps in flight than were provided for"
        return self._free.pop()

    def give_back(self, step_set: StepSet) -> None:
        """The step that used it is over."""
        assert step_set not in self._free
        self._free.append(step_set)
