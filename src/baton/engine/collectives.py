"""What the ranks of one instance say to each other, on process groups of their own, never the global default one.

    host_store -> RankGroup.connect (every rank; meets at the store) -> send, receive, all_gather, ... -> close

Every operation is built from sends and receives between two ranks, for three reasons: an error names the rank that is
gone, sums run in rank order (rank 0's term first) whatever the tensor's size and place in the batch, so that a layout
gives the same bits for every batch, and one group of connections serves the tensor ranks, the stages and the driver.
The price: an all-reduce sends (n - 1) tensors per rank where a ring sends 2 (n - 1) / n; for 2 ranks that is equal, for
4 it is twice as much, in one hop instead of six.

Deadlines: each wait on a peer has one. A peer whose connection breaks is known at once (`UnavailableError`), one that
hangs when the deadline passes (`DeadlineError`); both name rank and phase. After either the group is broken: the
instance ends as a whole.

Tensors on CUDA take `device_group.py`'s way, over NCCL, once `connect_device` has been called and every rank has a GPU
of its own; through host memory otherwise. Not safe for calls from two threads, except `send` and `Pending.wait` of
phase "control" beside everything else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from baton.engine.device_group import DeviceGroup, MakeGroup, device_token, make_nccl_group
from baton.errors import BatonError, ConfigError, DeadlineError, UnavailableError

__all__ = ["Pending", "RankGroup", "host_store"]

_log = logging.getLogger(__name__)
# The type stubs of torch cover neither process groups of one's own nor stores.
_dist: Any = torch.distributed

_TAGS = {"connect": 1, "control": 2, "activations": 3, "all-reduce": 4, "logits": 5, "sizes": 6}
_REASON_WAIT_S = 0.2
_MAX_REASON = 500


def host_store(host: str, *, port: int = 0, timeout_s: float = 60.0) -> Any:
    """The store at which an instance's ranks meet, listening on `host` only; `.port` tells where.

    It lives as long as the returned object.

    Raises:
        ConfigError: nothing can listen there.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.bind(address)
        listener.listen(128)
    except OSError as error:
        raise ConfigError(f"the ranks' store cannot listen on {host}:{port}: {error.strerror}") from error
    bound = listener.getsockname()[1]
    timeout = timedelta(seconds=timeout_s)
    return _dist.TCPStore(host, bound, None, True, timeout, wait_for_workers=False, master_listen_fd=listener.detach())


class Pending:
    """A send or receive under way; owns the tensor until `wait` returns."""

    __slots__ = ("__weakref__", "_group", "_peer", "_phase", "_work", "tensor")

    def __init__(self, group: RankGroup, work: Any, tensor: Tensor, peer: int, phase: str) -> None:
        self._group = group
        self._work: Any = work
        self._peer = peer
        self._phase = phase
        self.tensor = tensor

    def wait(self, deadline_s: float | None = None) -> Tensor:
        """Blocks until the tensor has been sent or received, and returns it.

        Raises:
            DeadlineError, UnavailableError: see the module.
        """
        limit_s = self._group.deadline_s if deadline_s is None else deadline_s
        begin_s = time.monotonic()
        work = self._work
        if work is None:
            raise self._group.closed_error(self._phase)
        try:
            work.wait(timedelta(seconds=limit_s))
        except RuntimeError as error:
            # The traceback would keep the connection open.
            del work
            self.drop()
            raise self._group.failure(self._peer, self._phase, error, time.monotonic() - begin_s) from error
        return self.tensor

    def drop(self) -> None:
        """Lets go of the connection, also where a traceback keeps this object."""
        self._work = None


class RankGroup:
    """All ranks of one instance, from one rank's side.

    Attributes:
        rank, size: this rank among how many.
        tensor_ranks: the ranks of this rank's stage, ascending; `all_reduce` and `gather` run among them.
        deadline_s: of each wait.
        device: collectives between the ranks' GPUs; None on CPU, and where ranks share a GPU.
    """

    def __init__(
        self,
        group: Any,
        store: Any,
        *,
        rank: int,
        size: int,
        tensor_ranks: Sequence[int],
        deadline_s: float,
        name: str,
    ) -> None:
        """See `connect`."""
        self.rank = rank
        self.size = size
        self.tensor_ranks = tuple(tensor_ranks)
        self.deadline_s = deadline_s
        self._group = group
        self._store = store
        self._name = name
        self._pending: weakref.WeakSet[Pending] = weakref.WeakSet()
        self._scratch: dict[int, Tensor] = {}
        self.device: DeviceGroup | None = None

    @classmethod
    def connect(
        cls,
        *,
        store_host: str,
        store_port: int,
        rank: int,
        size: int,
        tensor_ranks: Sequence[int],
        own_host: str = "127.0.0.1",
        name: str = "instance",
        deadline_s: float = 30.0,
        connect_s: float = 60.0,
    ) -> RankGroup:
        """Meet the other ranks and connect to each of them.

        Args:
            store_host, store_port: where `host_store` listens.
            own_host: address of this host that the other ranks reach; connections are bound to it.
            name: of the instance and its start, not used twice at one store.
            connect_s: how long to wait for the others, which may still be starting.

        Raises:
            UnavailableError: store or ranks did not show up in time.
        """
        timeout = timedelta(seconds=connect_s)
        options = _dist.ProcessGroupGloo._Options()
        options._timeout = timeout
        options._threads = 2
        try:
            before = _threads()
            options._devices = [_dist.ProcessGroupGloo.create_device(hostname=own_host)]
            _keep_behind(_threads() - before)
            client = _dist.TCPStore(store_host, store_port, None, False, timeout, wait_for_workers=False)
            store = _dist.PrefixStore(name, client)
            group = _dist.ProcessGroupGloo(store, rank, size, options)
        except RuntimeError as error:
            raise UnavailableError(
                f"rank {rank} of {name}: not all of {size} ranks met at {store_host}:{store_port} within"
                f" {connect_s:g} s: {_first_line(error)}"
            ) from error
        return cls(group, store, rank=rank, size=size, tensor_ranks=tensor_ranks, deadline_s=deadline_s, name=name)

    # ------------------------------------------------------------ between two ranks

    def send(self, tensor: Tensor, peer: int, phase: str) -> Pending:
        """Starts to send; sends of one phase to one peer arrive in order. Does not wait for the receiver."""
        tensor = tensor.detach().to("cpu").contiguous()
        return self._start("send", tensor, peer, phase)

    def receive(self, tensor: Tensor, peer: int, phase: str) -> Pending:
        """Starts to receive into `tensor` (on CPU, contiguous, as large as what comes)."""
        assert tensor.is_cpu
        assert tensor.is_contiguous()
        return self._start("recv", tensor, peer, phase)

    def _start(self, verb: str, tensor: Tensor, peer: int, phase: str) -> Pending:
        group = self._group
        if group is None:
            raise self.closed_error(phase)
        try:
            work = getattr(group, verb)([tensor], peer, _TAGS[phase])
        except RuntimeError as error:
            # The traceback would keep the connections open.
            del group
            raise self.failure(peer, phase, error, 0.0) from error
        pending = Pending(self, work, tensor, peer, phase)
        self._pending.add(pending)
        return pending

    # ------------------------------------------------------------ among the ranks of a stage

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over the stage's ranks, added up in rank order in fp32 and rounded once; equal bits on every rank."""
        if len(self.tensor_ranks) == 1:
            return tensor
        if tensor.is_cuda and self.device is not None:
            return self.device.all_reduce(tensor)
        parts = self._exchange(tensor, "all-reduce")
        if len(parts) == 2:
            # An addition of two numbers is done in fp32 and rounded once whatever the dtype: the same bits in one pass.
            return parts[0] + parts[1]
        total = parts[0].float() + parts[1]
        for part in parts[2:]:
            total += part
        return total.to(tensor.dtype)

    def gather(self, tensor: Tensor, num_columns: Sequence[int]) -> Tensor:
        """Puts the stage's columns side by side on its first rank.

        Args:
            tensor: [R, columns of this rank].
            num_columns: of each of the stage's ranks.

        Returns:
            [R, sum(num_columns)] on the stage's first rank, no rows on the others.
        """
        root = self.tensor_ranks[0]
        if tensor.shape[0] == 0:
            return tensor.new_empty((0, sum(num_columns)))
        if len(self.tensor_ranks) == 1:
            return tensor
        if tensor.is_cuda and self.device is not None:
            whole = self.device.gather_columns(tensor, num_columns)
            return whole if self.rank == root else whole[:0]
        if self.rank != root:
            self.send(tensor, root, "logits").wait()
            return tensor[:0]
        pending = [
            self.receive(torch.empty((tensor.shape[0], columns), dtype=tensor.dtype), peer, "logits")
            for peer, columns in zip(self.tensor_ranks[1:], num_columns[1:], strict=True)
        ]
        return torch.cat([tensor, *(receive.wait().to(tensor.device) for receive in pending)], dim=1)

    def _exchange(self, tensor: Tensor, phase: str) -> list[Tensor]:
        """Every stage rank's `tensor`, in rank order; the others' are overwritten by the next exchange."""
        own = tensor.detach().to("cpu").contiguous()
        peers = [peer for peer in self.tensor_ranks if peer != self.rank]
        receives = {peer: self.receive(self._scratch_like(own, peer), peer, phase) for peer in peers}
        sends = [self.send(own, peer, phase) for peer in peers]
        parts = [tensor if peer == self.rank else receives[peer].wait().to(tensor.device) for peer in self.tensor_ranks]
        for send in sends:
            send.wait()
        return parts

    def _scratch_like(self, tensor: Tensor, peer: int) -> Tensor:
        """Memory as `tensor` takes, the same in each exchange with `peer`: fresh pages cost as much as the sum."""
        num_bytes = tensor.numel() * tensor.element_size()
        scratch = self._scratch.get(peer)
        if scratch is None or scratch.numel() < num_bytes:
            scratch = self._scratch[peer] = torch.empty(num_bytes, dtype=torch.uint8)
        return scratch[:num_bytes].view(tensor.dtype).view(tensor.shape)

    # ------------------------------------------------------------ among all ranks

    def all_gather_ints(self, values: Sequence[int], deadline_s: float | None = None) -> list[list[int]]:
        """Every rank's `values` (equally many), in rank order. For sizes at start, where ranks may take their time."""
        own = torch.tensor(list(values), dtype=torch.int64)
        peers = [peer for peer in range(self.size) if peer != self.rank]
        receives = {peer: self.receive(torch.empty_like(own), peer, "sizes") for peer in peers}
        sends = [self.send(own, peer, "sizes") for peer in peers]
        result = [
            [int(v) for v in (own if peer == self.rank else receives[peer].wait(deadline_s)).tolist()]
            for peer in range(self.size)
        ]
        for send in sends:
            send.wait(deadline_s)
        return result

    def connect_device(self, device: torch.device, *, make_group: MakeGroup = make_nccl_group) -> None:
        """Connects the ranks' GPUs; all ranks call it. A failure there breaks this group too.

        Raises:
            DeadlineError, UnavailableError: see the module.
        """
        tokens = [token for (token,) in self.all_gather_ints([device_token(device)])]
        if len(set(tokens)) < len(tokens):
            _log.warning("%s: ranks share a GPU, which NCCL refuses: tensors travel through host memory", self._name)
            return

        def on_broken(error: BatonError) -> None:
            self.leave_reason(error.message)
            self.close()

        self.device = DeviceGroup(
            self._store,
            rank=self.rank,
            tensor_ranks=self.tensor_ranks,
            num_ranks=self.size,
            device=device,
            deadline_s=self.deadline_s,
            on_broken=on_broken,
            make_group=make_group,
        )

    # ------------------------------------------------------------ failure and end

    def failure(self, peer: int, phase: str, error: BaseException, waited_s: float) -> BatonError:
        """The error that says what happened on the way to `peer`, with the reason it left behind, if any."""
        text = _first_line(error)
        here = f"rank {self.rank} of {self._name}, {phase}"
        reason = self._reason_of(peer)
        if reason:
            return UnavailableError(f"{here}: rank {peer} failed: {reason}")
        if "Timed out" in text or "timed out" in text:
            return DeadlineError(f"{here}: rank {peer} did not answer within {waited_s:.1f} s")
        return UnavailableError(f"{here}: the connection to rank {peer} broke: {text}")

    def closed_error(self, phase: str) -> UnavailableError:
        """For whoever uses the group after `close`."""
        return UnavailableError(f"rank {self.rank} of {self._name}, {phase}: the group is closed")

    def leave_reason(self, reason: str) -> None:
        """Tells the others why this rank is about to end; they read it when the connection breaks."""
        self._ask_store(lambda: self._store.set(f"failed/{self.rank}", reason[:_MAX_REASON]))

    def _reason_of(self, peer: int) -> str:
        key = f"failed/{peer}"
        reason = self._ask_store(lambda: self._store.get(key) if self._store.check([key]) else b"")
        return "" if reason is None else bytes(reason).decode(errors="replace")

    def _ask_store(self, ask: Callable[[], Any]) -> Any:
        """What the store says within `_REASON_WAIT_S`, or None: without a store an error is reported without a reason.

        On a thread of its own, as a store whose host hangs answers never, whatever the timeout.
        """
        answers: list[Any] = []

        def run() -> None:
            # Where the store is gone its host has died, and the others hear of that by themselves.
            with contextlib.suppress(RuntimeError):
                answers.append(ask())

        thread = threading.Thread(target=run, name="baton-ask-store", daemon=True)
        thread.start()
        thread.join(_REASON_WAIT_S)
        return answers[0] if answers else None

    def close(self) -> None:
        """Breaks all connections; ranks that wait for this one hear of it at once."""
        # Gloo's `abort` leaves connections open: they end with the last reference to the group or to its work.
        self._group = None
        if self.device is not None:
            self.device.close()
        for pending in list(self._pending):
            pending.drop()


def _threads() -> set[int]:
    """This process's threads, by the system's numbers; none where it does not tell."""
    try:
        return {int(name) for name in os.listdir("/proc/self/task")}
    except OSError:
        return set()


def _keep_behind(threads: Iterable[int]) -> None:
    """Where this rank has one core, keeps `threads`, gloo's event loop, from taking it in the middle of our calls.

    The loop skips a connection whose lock is taken and looks again at once. Woken on the core of the thread that holds
    the lock, it takes that core and spins until the system's next tick: up to 4 ms in an exchange of 0.1 ms. A batch
    thread does not push others aside when it wakes. With several cores it wakes on another one, and stays as it is.
    """
    with contextlib.suppress(OSError, AttributeError):
        if len(os.sched_getaffinity(0)) == 1:
            for thread in threads:
                os.sched_setscheduler(thread, os.SCHED_BATCH, os.sched_param(0))


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0][:200] if str(error) else type(error).__name__
