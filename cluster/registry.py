"""The registry service: takes heartbeats, tells watchers who is there. Never on a token's path.

    Announce     worker or router -> lease; a `dead` status leaves at once
    Watch        the whole list at once, then again at each change (loads alone are no change)
    GetCluster   the list with the newest loads
    Meet         the ranks of an instance find their driver; waits for it
    StopCluster  sets `stop_requested`
    Hold         puts an instance among `held`, which the controller ends and does not start, or takes it out

A registry knows nobody when it begins, also where everybody is there and only the controller is new: its lists are
partial (`is_partial`) for one lease, in which all who live announce themselves. `incarnation` is its process's own. The
same holds for a registry that was stopped for a while (a paused process, a machine without time for it): the leases
that ran out meanwhile are its own fault.

Instances that the launcher knows but that did not announce themselves (yet, or any more) are listed too, through
`set_unannounced`, with state "starting" or "dead" and no address.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import socket
from collections.abc import AsyncIterator, Callable, Collection, Iterable
from typing import Any

import grpc

from baton import faults
from baton.clock import Clock, MonotonicClock
from baton.cluster.registry_state import RegistryState
from baton.cluster.rendezvous import Rendezvous
from baton.config import split_host_port
from baton.errors import UnavailableError
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["LEASE_S", "MAX_MEET_S", "RegistryServer"]

logger = logging.getLogger(__name__)

LEASE_S = 3.0
_EXPIRY_PERIOD_S = 0.25
# A look at the leases that comes later than this was kept from it, as the announcements were.
_LATE_S = 1.0
_MAX_MESSAGE_BYTES = 1 << 20
MAX_MEET_S = 600.0
"""Longest wait for a driver; a longer one that is asked for ends here."""
_MAX_NAME_CHARS = 256
_STATES = ("starting", "ready", "draining", "dead")


class RegistryServer(worker_pb2_grpc.RegistryServicer):
    """One per cluster.

    Args:
        note: called when `held` or `stop_requested` has changed, before that is answered.

    Attributes:
        stop_requested: set by StopCluster.
        held: see Hold.
        desired: ids that may be held although nobody announces them now.
    """

    def __init__(
        self,
        cluster_name: str,
        launcher: str,
        *,
        note: Callable[[], None] = lambda: None,
        clock: Clock | None = None,
    ) -> None:
        self.address = ""
        self.stop_requested = asyncio.Event()
        self.held: set[str] = set()
        self.desired: Collection[str] = ()
        self.is_partial = True
        self.incarnation = secrets.token_bytes(16)
        self._partial_until_s = 0.0
        self._partial_version = 0
        self._note = note
        self._cluster_name = cluster_name
        self._launcher = launcher
        self._clock = clock or MonotonicClock()
        self._state: RegistryState[worker_pb2.WorkerStatus] = RegistryState(LEASE_S)
        self._unannounced: dict[str, worker_pb2.WorkerStatus] = {}
        self._unannounced_version = 0
        self._changed = asyncio.Condition()
        self._rendezvous = Rendezvous()
        self._met = asyncio.Condition()
        self._closed = False
        self._server: grpc.aio.Server | None = None
        self._expiry: asyncio.Task[None] | None = None

    async def start(self, host: str = "127.0.0.1", port: int = 0) -> str:
        """Listen, and return host:port.

        Raises:
            UnavailableError: something else listens there.
        """
        problem = _listen_problem(host, port)
        if problem:
            raise UnavailableError(f"the registry cannot listen on {host}:{port}: {problem}")
        server = grpc.aio.server(
            options=[
                ("grpc.max_receive_message_length", _MAX_MESSAGE_BYTES),
                ("grpc.so_reuseport", 0),
                # Watching routers ping idle streams every 10 s to notice half-open connections.
                ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ]
        )
        worker_pb2_grpc.add_RegistryServicer_to_server(self, server)
        try:
            self.address = f"{host}:{server.add_insecure_port(f'{host}:{port}')}"
        except RuntimeError as error:
            raise UnavailableError(f"the registry cannot listen on {host}:{port}: {error}") from error
        await server.start()
        self._server = server
        self._set_partial()
        self._expiry = asyncio.create_task(self._expire_forever())
        return self.address

    async def close(self) -> None:
        """End all watches and stop listening, within a second."""
        self._closed = True
        if self._expiry is not None:
            self._expiry.cancel()
        await self._notify()
        async with self._met:
            self._met.notify_all()
        if self._server is not None:
            await self._server.stop(grace=1.0)

    def statuses(self) -> dict[str, worker_pb2.WorkerStatus]:
        """The newest status of every announced instance."""
        return self._state.values()

    def silent_for(self) -> dict[str, float]:
        """See `RegistryState.silent_for`."""
        return self._state.silent_for(self._clock.now_s())

    def instance_list(self) -> worker_pb2.InstanceList:
        """What Watch and GetCluster answer."""
        announced = self._state.values()
        missing = [status for instance_id, status in self._unannounced.items() if instance_id not in announced]
        instances: list[worker_pb2.WorkerStatus] = sorted([*announced.values(), *missing], key=_place)
        return worker_pb2.InstanceList(
            version=self._version,
            instances=instances,
            cluster_name=self._cluster_name,
            controller_address=self.address,
            launcher=self._launcher,
            is_partial=self.is_partial,
            incarnation=self.incarnation,
        )

    def expect(self, instance_ids: Iterable[str]) -> None:
        """These run and will announce themselves to this registry; until they do, they are silent."""
        for instance_id in instance_ids:
            self._state.expect(instance_id, self._clock.now_s())

    async def set_unannounced(self, statuses: Iterable[worker_pb2.WorkerStatus]) -> None:
        """Tell which instances the launcher knows, for those that do not speak for themselves."""
        unannounced = {status.instance_id: status for status in statuses}
        if unannounced != self._unannounced:
            self._unannounced = unannounced
            self._unannounced_version += 1
            await self._notify()

    async def forget(self, instance_id: str) -> None:
        """Forget an instance that is no longer wanted, and where its ranks met."""
        self._rendezvous.forget(instance_id)
        await self.remove(instance_id)

    async def remove(self, instance_id: str) -> None:
        """Forget an instance whose process has ended, without waiting for its lease."""
        if self._state.remove(instance_id):
            await self._notify()

    async def Announce(self, request: worker_pb2.WorkerStatus, context: Any) -> worker_pb2.AnnounceReply:
        """One heartbeat."""
        if not request.instance_id or request.state not in _STATES:
            await context.abort(
                grpc.StatusCode.INVALID_ARGUMENT,
                f"an announcement needs instance_id and a state of {', '.join(_STATES)}; got {request.state!r}",
            )
        if faults.active is not None:
            faults.strike("announce", peer=request.instance_id)
        version = self._state.version
        if request.state == "dead":
            self._state.remove(request.instance_id)
        else:
            known = self._state.announce(
                request.instance_id, request.incarnation, _content(request), request, self._clock.now_s()
            )
            if not known:
                await context.abort(
                    grpc.StatusCode.FAILED_PRECONDITION, f"{request.instance_id} was replaced; this incarnation is over"
                )
        if self._state.version != version:
            await self._notify()
        return worker_pb2.AnnounceReply(lease_s=LEASE_S)

    async def Watch(self, request: worker_pb2.WatchRequest, context: Any) -> AsyncIterator[worker_pb2.InstanceList]:
        """The list now and at each change, until either side ends."""
        seen = -1
        while not self._closed:
            if self._version != seen:
                seen = self._version
                yield self.instance_list()
            async with self._changed:
                # Bounded by the client's cancellation and by close(), which notifies.
                while self._version == seen and not self._closed:
                    await self._changed.wait()

    async def GetCluster(self, request: worker_pb2.GetClusterRequest, context: Any) -> worker_pb2.InstanceList:
        """The list with the newest loads."""
        return self.instance_list()

    async def Meet(self, request: worker_pb2.MeetRequest, context: Any) -> worker_pb2.MeetReply:
        """The driver's address, told by the driver or waited for."""
        instance_id, start_id = request.instance_id, request.start_id
        problem = _meet_problem(request)
        if problem:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, problem)
        refusal = self._rendezvous.enter(instance_id, start_id)
        if refusal:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, refusal)
        async with self._met:
            if request.driver_address:
                self._rendezvous.tell(instance_id, start_id, request.driver_address)
            # Also when only the start is new: those who wait on an older one are told that it is over.
            self._met.notify_all()
        timeout_s = min(request.timeout_s, MAX_MEET_S)
        try:
            address = await self._driver_address(instance_id, start_id, timeout_s)
        except TimeoutError:
            await context.abort(
                grpc.StatusCode.DEADLINE_EXCEEDED,
                f"the driver of {instance_id} (start {start_id}) did not tell its address within {timeout_s:.1f} s",
            )
        if address is None:
            await context.abort(
                grpc.StatusCode.FAILED_PRECONDITION,
                f"start {start_id} of {instance_id} is over; another one took its place",
            )
        if not address:
            await context.abort(grpc.StatusCode.UNAVAILABLE, "the registry ends")
        return worker_pb2.MeetReply(driver_address=address)

    async def StopCluster(self, request: worker_pb2.StopClusterRequest, context: Any) -> worker_pb2.StopClusterReply:
        """Ask the controller to stop everything; returns at once."""
        self.stop_requested.set()
        self._note()
        return worker_pb2.StopClusterReply()

    async def Hold(self, request: worker_pb2.HoldRequest, context: Any) -> worker_pb2.HoldReply:
        """Hold or release an instance; the controller sees to the rest."""
        known = {status.instance_id for status in self.instance_list().instances} | self.held | set(self.desired)
        if request.instance_id not in known:
            await context.abort(
                grpc.StatusCode.NOT_FOUND,
                f"there is no instance {request.instance_id[:_MAX_NAME_CHARS]!r}; there are {', '.join(sorted(known))}",
            )
        (self.held.add if request.held else self.held.discard)(request.instance_id)
        self._note()
        return worker_pb2.HoldReply(held=sorted(self.held))

    async def _driver_address(self, instance_id: str, start_id: str, timeout_s: float) -> str | None:
        """As `Rendezvous.address`; empty only when the registry ends."""
        address = self._rendezvous.address(instance_id, start_id)
        if address != "":
            return address
        async with asyncio.timeout(timeout_s), self._met:
            while (address := self._rendezvous.address(instance_id, start_id)) == "" and not self._closed:
                await self._met.wait()
        return address

    @property
    def _version(self) -> int:
        return self._state.version + self._unannounced_version + self._partial_version

    async def _notify(self) -> None:
        async with self._changed:
            self._changed.notify_all()

    def _set_partial(self) -> None:
        """The list is partial for a lease from now."""
        self.is_partial = True
        self._partial_until_s = self._clock.now_s() + LEASE_S
        self._partial_version += 1

    async def _expire_forever(self) -> None:
        looked_s = self._clock.now_s()
        while True:
            await asyncio.sleep(_EXPIRY_PERIOD_S)
            now_s = self._clock.now_s()
            away_s, looked_s = now_s - looked_s - _EXPIRY_PERIOD_S, now_s
            if away_s > _LATE_S:
                logger.warning("the registry was stopped for %.1f s; nobody is gone because of that", away_s)
                self._state.extend(away_s)
                self._set_partial()
                await self._notify()
            elif self.is_partial and now_s >= self._partial_until_s:
                self.is_partial = False
                self._partial_version += 1
                await self._notify()
            gone = self._state.expire(now_s)
            if gone:
                logger.warning("no heartbeat for %.1f s from %s", LEASE_S, ", ".join(gone))
                await self._notify()


def _listen_problem(host: str, port: int) -> str:
    """Why nothing can listen there, in the system's words, which gRPC keeps to itself; empty where one can."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            # What a registry that died has left in TIME_WAIT is no hindrance.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen(1)
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _meet_problem(request: worker_pb2.MeetRequest) -> str:
    """What is wrong with the request, or the empty string."""
    for key, value in (("instance_id", request.instance_id), ("start_id", request.start_id)):
        if not 0 < len(value) <= _MAX_NAME_CHARS:
            return f"{key} needs 1 to {_MAX_NAME_CHARS} characters, got {len(value)}"
    if not request.timeout_s >= 0:
        return f"timeout_s must be at least 0, got {request.timeout_s}"
    if len(request.driver_address) > _MAX_NAME_CHARS:
        return f"driver_address has more than {_MAX_NAME_CHARS} characters"
    if request.driver_address:
        try:
            split_host_port(request.driver_address)
        except ValueError as error:
            return f"driver_address: {error}"
    return ""


def _place(status: worker_pb2.WorkerStatus) -> tuple[str, int, str]:
    """Sorts by role, then "decode-2" before "decode-10"."""
    return status.role, len(status.instance_id), status.instance_id


def _content(status: worker_pb2.WorkerStatus) -> bytes:
    """What makes two announcements different for watchers: everything but the load."""
    content = worker_pb2.WorkerStatus()
    content.CopyFrom(status)
    content.ClearField("load")
    return content.SerializeToString(deterministic=True)
