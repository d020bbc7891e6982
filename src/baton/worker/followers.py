"""The driver's view of the other ranks of its instance: who has joined, what they report, and that they live.

    open --every follower has sent hello--> joined --every one has sent ready--> ready --stop--> over
      any --a stream breaks, or a rank says that it failed--> lost (told once, with the rank and its reason)

Serves `Ranks.Join` on a port of its own, open before the model loads, so that a rank that dies is known within
milliseconds at any time: the kernel closes its stream. Ranks whose host vanishes are found by keep-alive pings, ranks
that hang by the deadlines of the collectives. Everything runs on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from typing import Any

import grpc

from baton.engine.collectives import host_store
from baton.errors import DeadlineError, UnavailableError
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.channels import open_channel
from baton.worker.keepalive import SERVER_OPTIONS

__all__ = ["Followers"]

_log = logging.getLogger(__name__)
_HELLO_TIMEOUT_S = 10.0
# A rank that fails says why a moment before its stream breaks, and others fail in turn: the first cause is wanted.
_LAST_WORDS_S = 0.1
_MEET_TIMEOUT_S = 10.0


@dataclass(slots=True, eq=False)
class _Follower:
    status: pb.RankStatus
    outbox: asyncio.Queue[pb.RankCommand | None] = field(default_factory=asyncio.Queue)
    is_ready: bool = False
    reason: str = ""


class Followers(rpc.RanksServicer):
    """All ranks of an instance but the driver.

    Args:
        placement: the driver's.
        on_progress: told (rank, what is done, fraction) while ranks load.
        on_figures: told (rank, figures), about once a second.
        on_stopping: a rank was asked to end.
        on_lost: told once, with the error that names the first rank that was lost.

    Attributes:
        on_part: set by the role; told (rank, event) of handovers.
        on_links_warm: set by the role; told (rank, serial) when a rank has tried to make links.
    """

    def __init__(
        self,
        placement: Placement,
        *,
        on_progress: Callable[[int, str, float], None],
        on_figures: Callable[[int, pb.RankFigures], None],
        on_stopping: Callable[[], None],
        on_lost: Callable[[UnavailableError], None],
    ) -> None:
        self._placement = placement
        self.on_part: Callable[[int, pb.PartEvent], None] | None = None
        self.on_links_warm: Callable[[int, int], None] | None = None
        self._on_progress = on_progress
        self._on_figures = on_figures
        self._on_stopping = on_stopping
        self._on_lost = on_lost
        self._joined: dict[int, _Follower] = {}
        self._all_ready = asyncio.Event()
        self._all_gone = asyncio.Event()
        self._lost: dict[int, str] = {}
        self._telling: asyncio.TimerHandle | None = None
        self._is_stopping = False
        self._server: grpc.aio.Server | None = None
        self._store: Any = None
        self.store_address = ""
        self.group_name = f"{placement.instance_id}-{placement.start_id}"

    @property
    def ranks(self) -> list[int]:
        """Ranks of the followers, whether they have joined or not."""
        return [rank for rank in range(self._placement.num_ranks) if rank != self._placement.rank]

    def statuses(self) -> list[pb.RankStatus]:
        """Of those that have joined."""
        return [follower.status for _, follower in sorted(self._joined.items())]

    async def open(self, registry_address: str) -> None:
        """Opens the port and the store of the collectives, and tells the registry where.

        Raises:
            UnavailableError: the registry does not answer.
        """
        host = self._placement.host
        self._store = host_store(host)
        self.store_address = f"{host}:{self._store.port}"
        self._server = grpc.aio.server(options=[("grpc.so_reuseport", 0), *SERVER_OPTIONS])
        rpc.add_RanksServicer_to_server(self, self._server)
        address = f"{host}:{self._server.add_insecure_port(f'{host}:0')}"
        await self._server.start()
        request = pb.MeetRequest(
            instance_id=self._placement.instance_id,
            start_id=self._placement.start_id,
            driver_address=address,
            timeout_s=_MEET_TIMEOUT_S,
        )
        async with open_channel(registry_address) as channel:
            try:
                await rpc.RegistryStub(channel).Meet(request, timeout=_MEET_TIMEOUT_S, wait_for_ready=True)
            except grpc.aio.AioRpcError as error:
                raise UnavailableError(
                    f"{self._placement.name} cannot tell registry {registry_address} where its ranks meet:"
                    f" {error.details()}"
                ) from error

    async def wait_ready(self, timeout_s: float) -> None:
        """Returns when every follower has loaded and serves.

        Raises:
            DeadlineError: names those that have not.
        """
        try:
            await asyncio.wait_for(self._all_ready.wait(), timeout_s)
        except TimeoutError:
            late = [r for r in self.ranks if r not in self._joined or not self._joined[r].is_ready]
            raise DeadlineError(
                f"{self._placement.instance_id}: ranks {', '.join(map(str, late))} were not ready within"
                f" {timeout_s:.0f} s"
            ) from None

    def send(self, command: pb.RankCommand) -> None:
        """Queues a command for every follower; each gets all of them in order."""
        for follower in self._joined.values():
            follower.outbox.put_nowait(command)

    def expect_end(self) -> None:
        """From now on ranks that end are no failure."""
        self._is_stopping = True

    async def close(self, timeout_s: float) -> None:
        """Lets every follower end, waits for that, and closes the port."""
        self.expect_end()
        if self._telling is not None:
            self._telling.cancel()
        self.send(pb.RankCommand(stop=pb.StopRank()))
        if self._joined:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_gone.wait(), timeout_s)
        for follower in self._joined.values():
            follower.outbox.put_nowait(None)
        if self._server is not None:
            await self._server.stop(grace=0.2)
        self._store = None

    # ------------------------------------------------------------ the stream

    async def Join(
        self,
        request_iterator: AsyncIterator[pb.RankEvent],
        context: grpc.aio.ServicerContext[pb.RankEvent, pb.RankCommand],
    ) -> AsyncIterator[pb.RankCommand]:
        """One follower's stream, from its start to its end."""
        events = aiter(request_iterator)
        try:
            async with asyncio.timeout(_HELLO_TIMEOUT_S):
                first = await anext(events, None)
        except TimeoutError:
            return
        refusal = "the first event must be hello" if first is None else self._refusal(first)
        if refusal or first is None:
            yield pb.RankCommand(welcome=pb.RankWelcome(refusal=refusal))
            return
        hello = first.hello
        follower = _Follower(
            pb.RankStatus(rank=hello.rank, pid=hello.pid, incarnation=hello.incarnation, host=hello.host)
        )
        self._joined[hello.rank] = follower
        _log.info("rank %d joined (pid %d on %s)", hello.rank, hello.pid, hello.host)
        yield pb.RankCommand(welcome=pb.RankWelcome(store_address=self.store_address, group_name=self.group_name))
        reader = asyncio.create_task(self._read(follower, events), name=f"read rank {hello.rank}")
        try:
            while (command := await follower.outbox.get()) is not None:
                yield command
        finally:
            reader.cancel()
            self._gone(follower)

    def _refusal(self, first: pb.RankEvent) -> str:
        if first.WhichOneof("event") != "hello":
            return "the first event must be hello"
        hello, me = first.hello, self._placement
        if (hello.instance_id, hello.start_id) != (me.instance_id, me.start_id):
            return f"this is {me.instance_id} start {me.start_id}, not {hello.instance_id} start {hello.start_id}"
        if hello.rank not in self.ranks or hello.rank in self._joined:
            return f"rank {hello.rank} of {me.num_ranks} is the driver's, has joined before or does not exist"
        return ""

    async def _read(self, follower: _Follower, events: AsyncIterator[pb.RankEvent]) -> None:
        try:
            async for event in events:
                self._take(follower, event)
        except grpc.aio.AioRpcError as error:
            _log.info("stream of rank %d: %s", follower.status.rank, error.code())
        except Exception as error:
            # A bug of ours: told as the reason why the instance ends, not lost with this task.
            _log.exception("event of rank %d", follower.status.rank)
            follower.reason = follower.reason or f"its driver could not take an event: {type(error).__name__}: {error}"
        finally:
            follower.outbox.put_nowait(None)
            self._gone(follower)

    def _take(self, follower: _Follower, event: pb.RankEvent) -> None:
        rank = follower.status.rank
        match event.WhichOneof("event"):
            case "progress":
                self._on_progress(rank, event.progress.detail, event.progress.progress)
            case "ready":
                follower.status.address = event.ready.address
                follower.is_ready = True
                if all(r in self._joined and self._joined[r].is_ready for r in self.ranks):
                    self._all_ready.set()
            case "part":
                assert self.on_part is not None, "parts come after the role has begun"
                self.on_part(rank, event.part)
            case "figures":
                self._on_figures(rank, event.figures)
            case "links_warm":
                if self.on_links_warm is not None:
                    self.on_links_warm(rank, event.links_warm.serial)
            case "stopping":
                self._on_stopping()
            case "failed":
                follower.reason = event.failed.reason
            case other:
                _log.warning("rank %d sent an unknown event %r; ignored", rank, other)

    def _gone(self, follower: _Follower) -> None:
        rank = follower.status.rank
        if rank in self._lost:
            return
        self._lost[rank] = follower.reason
        if len(self._lost) == len(self.ranks):
            self._all_gone.set()
        if not self._is_stopping and self._telling is None:
            self._telling = asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._tell)

    def _tell(self) -> None:
        if self._is_stopping:
            return
        self._is_stopping = True
        # A rank that was killed says nothing, those that fail because of it do.
        rank = min(self._lost, key=lambda lost: (bool(self._lost[lost]), lost))
        status, reason = self._joined[rank].status, self._lost[rank]
        how = f"failed: {reason}" if reason else "ended without a word (killed, or out of memory?)"
        self._on_lost(
            UnavailableError(
                f"rank {rank} of {self._placement.instance_id} (pid {status.pid} on {status.host}) {how}; the whole"
                " instance ends"
            )
        )
