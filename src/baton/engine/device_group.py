"""Collectives between the GPUs of an instance's ranks, over NCCL: the host enqueues them and never waits in one.

    enqueued --the GPUs meet--> done
             --deadline passes, or NCCL reports an error--> broken: communicators aborted, `on_broken` told once

One communicator among the tensor ranks of a stage, one of two ranks to the stage before, one to the stage after. As on
the host (`collectives.py`) an all-reduce is an all-gather and a sum in rank order, so that a layout gives the same bits
for every batch; NCCL's own sums change their order with the size.

A thread watches what was enqueued: NCCL itself would wait for ever for a rank that is gone. Aborts run on threads of
their own, since they may hang (pytorch/pytorch#119196 and the like); the process of a broken rank ends anyway.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from baton.errors import BatonError, DeadlineError, UnavailableError

__all__ = ["DeviceGroup", "MakeGroup", "device_token", "make_nccl_group"]

_log = logging.getLogger(__name__)
# The type stubs of torch do not cover process groups of one's own.
_dist: Any = torch.distributed
_POLL_S = 0.05

# (store, rank, size, device) -> a process group of that many ranks.
MakeGroup = Callable[[Any, int, int, torch.device], Any]


def make_nccl_group(store: Any, rank: int, size: int, device: torch.device) -> Any:
    """A communicator of our own, connected at once; its deadlines are kept here, not by torch's watchdog."""
    options = _dist.ProcessGroupNCCL.Options()
    options._timeout = timedelta(days=1)
    options.is_high_priority_stream = True
    group = _dist.ProcessGroupNCCL(store, rank, size, options)
    group.eager_connect_single_device(device)
    return group


def device_token(device: torch.device) -> int:
    """A number that two ranks share only where they share a GPU: NCCL refuses a communicator between those.

    On other devices, in tests, ranks are threads.
    """
    if device.type != "cuda":
        return threading.get_ident()
    uuid = str(torch.cuda.get_device_properties(device).uuid)
    return int(uuid.replace("-", "")[:15], 16)


class DeviceGroup:
    """One rank's communicators.

    Args:
        store: where the ranks of this start meet.
        rank: in the instance.
        tensor_ranks: of this rank's stage.
        num_ranks: of the instance.
        device: this rank's GPU.
        deadline_s: from the enqueueing of a collective until it must be done.
        on_broken: told once, on a thread of its own.
        make_group: NCCL; tests put another back end in.
    """

    def __init__(
        self,
        store: Any,
        *,
        rank: int,
        tensor_ranks: Sequence[int],
        num_ranks: int,
        device: torch.device,
        deadline_s: float,
        on_broken: Callable[[BatonError], None],
        make_group: MakeGroup = make_nccl_group,
    ) -> None:
        self._rank = rank
        self._tensor_ranks = tuple(tensor_ranks)
        self._device = device
        self._deadline_s = deadline_s
        self._on_broken = on_broken
        self._broken: BatonError | None = None
        self._closed = threading.Event()
        self._under_way: deque[tuple[float, Callable[[], bool], str]] = deque()
        self._lock = threading.Lock()
        stage, tensor_parallel = tensor_ranks[0], len(tensor_ranks)

        def made(name: str, own: int, size: int) -> Any:
            return make_group(_dist.PrefixStore(f"device/{name}", store), own, size, device)

        self._stage_group = made(f"stage-{stage}", rank - stage, tensor_parallel) if tensor_parallel > 1 else None
        # Both ends make the pairs of a boundary in the order of the boundaries, so nobody waits in a circle.
        before, after = rank - tensor_parallel, rank + tensor_parallel
        self._before = made(f"pair-{before}-{rank}", 1, 2) if before >= 0 else None
        self._after = made(f"pair-{rank}-{after}", 0, 2) if after < num_ranks else None
        self._watcher = threading.Thread(target=self._watch, name="baton-device-group", daemon=True)
        self._watcher.start()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the stage's ranks, in rank order in fp32, rounded once. Enqueues only."""
        parts = self.all_gather(tensor)
        total = parts[0].float()
        for part in parts[1:]:
            total += part
        return total.to(tensor.dtype)

    def all_gather(self, tensor: Tensor) -> list[Tensor]:
        """Every stage rank's `tensor`, in rank order. Enqueues only."""
        group = self._stage_group
        if group is None:
            return [tensor]
        parts = [torch.empty_like(tensor) for _ in self._tensor_ranks]
        self._run(lambda: group.allgather([parts], [tensor.contiguous()]), "all-gather")
        return parts

    def gather_columns(self, tensor: Tensor, num_columns: Sequence[int]) -> Tensor:
        """[R, columns of this rank] of all stage ranks side by side, [R, sum(num_columns)], on every one of them."""
        widest = max(num_columns)
        padded = torch.nn.functional.pad(tensor, (0, widest - tensor.shape[1]))
        parts = self.all_gather(padded)
        return torch.cat([part[:, :columns] for part, columns in zip(parts, num_columns, strict=True)], dim=1)

    def send(self, tensor: Tensor) -> None:
        """To the same tensor rank of the stage after. Enqueues only."""
        after = self._after
        assert after is not None, "the last stage has nobody to send to"
        self._run(lambda: after.send([tensor.contiguous()], 1, 0), "activations")

    def receive(self, tensor: Tensor) -> Tensor:
        """From the same tensor rank of the stage before, into `tensor`, which is returned. Enqueues only."""
        before = self._before
        assert before is not None, "the first stage has nobody to receive from"
        self._run(lambda: before.recv([tensor], 0, 0), "activations")
        return tensor

    def close(self) -> None:
        """Ends the watching and lets go of the communicators, without waiting for them."""
        self._closed.set()
        for group in (self._stage_group, self._before, self._after):
            if group is not None:
                threading.Thread(target=_abort, args=(group,), name="baton-abort", daemon=True).start()

    # ------------------------------------------------------------ inside

    def _run(self, enqueue: Callable[[], Any], phase: str) -> None:
        """Enqueues, and makes the current stream wait; elsewhere than on CUDA it is this thread that waits."""
        if self._broken is not None:
            raise self._broken
        begin_s = time.monotonic()
        try:
            work = enqueue()
            if self._device.type != "cuda":
                self._watch_over(begin_s, work.is_completed, phase)
            work.wait()
        except RuntimeError as error:
            raise self._break(UnavailableError(f"{self._here(phase)}: {_first_line(error)}")) from error
        if self._device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            self._watch_over(begin_s, event.query, phase)

    def _watch_over(self, begin_s: float, is_done: Callable[[], bool], phase: str) -> None:
        with self._lock:
            self._under_way.append((begin_s, is_done, phase))

    def _watch(self) -> None:
        while not self._closed.wait(_POLL_S):
            with self._lock:
                while self._under_way and self._under_way[0][1]():
                    self._under_way.popleft()
                oldest = self._under_way[0] if self._under_way else None
            if oldest is None:
                continue
            waited_s = time.monotonic() - oldest[0]
            if waited_s > self._deadline_s:
                text = f"{self._here(oldest[2])}: not all ranks came within {self._deadline_s:g} s"
                self._break(DeadlineError(text))
                return

    def _here(self, phase: str) -> str:
        peers = ", ".join(map(str, self._tensor_ranks))
        return f"rank {self._rank}, {phase} on {self._device} (stage of ranks {peers})"

    def _break(self, error: BatonError) -> BatonError:
        with self._lock:
            if self._broken is not None:
                return self._broken
            self._broken = error
        _log.error("%s", error)
        self.close()
        self._on_broken(error)
        return error


def _abort(group: Any) -> None:
    # Whatever an abort finds broken is what it was called for.
    with contextlib.suppress(RuntimeError, AttributeError):
        group.abort()


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
