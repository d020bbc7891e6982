"""Looks at a cluster while faults come: who is listed in which state, what routers count, how processes grow.

Looks are taken with short deadlines from one task, so that a controller or router that is away costs a look and no
more. What is away keeps its last value; a counter that starts anew (its process did) is added to what was counted.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Sequence

import grpc
import httpx

from baton.cluster.chaos.growth import Sample
from baton.cluster.chaos.members import CONTROLLER, Member, Rank, member_of
from baton.cluster.chaos.processes import descriptors, is_local, listener_pid, resident_bytes
from baton.cluster.chaos.report import Change
from baton.cluster.run_state import RunState, read_run_state
from baton.errors import BatonError
from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

__all__ = ["Observer"]

_PERIOD_S = 0.1
_FIGURES_PERIOD_S = 1.0
_LOOK_TIMEOUT_S = 1.0
_FIRST_LOOK_S = 10.0
_RESUMES = re.compile(r"^baton_resumes_total\{[^}]*\} (\S+)$", re.MULTILINE)


class Observer:
    """Of the cluster whose run state is `state`. A context manager: it looks from its start to its end.

    Attributes:
        members: instances as last listed.
        changes: of the instances, times as `now_s` tells them.
        samples: of every process on this host, by (instance id, pid).
    """

    def __init__(self, state: RunState, *, now_s: Callable[[], float] = time.monotonic) -> None:
        self._state = state
        self._now_s = now_s
        self._address = state.registry_address
        self._tasks: list[asyncio.Task[None]] = []
        self._client = httpx.AsyncClient(timeout=_LOOK_TIMEOUT_S, trust_env=False)
        self._counted: dict[tuple[str, str], float] = {}
        self._counted_before: dict[tuple[str, str], float] = {}
        self.members: dict[str, Member] = {}
        self.changes: list[Change] = []
        self.samples: dict[tuple[str, int], list[Sample]] = {}
        self.is_registry_away = False
        self._looked = asyncio.Condition()

    async def __aenter__(self) -> Observer:
        await self._look_first()
        await self._count()
        self._counted_before = dict(self._counted)
        self._tasks = [asyncio.create_task(self._look_forever()), asyncio.create_task(self._count_forever())]
        return self

    async def _look_first(self) -> None:
        """All that begins here goes by what is listed: one look at a registry that stands still is not enough."""
        until_s = time.monotonic() + _FIRST_LOOK_S
        await self._look()
        while self.is_registry_away and time.monotonic() < until_s:
            await asyncio.sleep(_PERIOD_S)
            await self._look()

    async def __aexit__(self, *error: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._client.aclose()

    def forget_past(self) -> None:
        """Changes and samples so far are of another clock."""
        self.changes.clear()
        self.samples.clear()
        self._counted_before = dict(self._counted)

    @property
    def registry_address(self) -> str:
        """Where the controller was last."""
        return self._address

    @property
    def resumes(self) -> int:
        """Attempts that broke and were dispatched again, since this began; what a dead router had not told is lost."""
        counted = sum(self._counted.values()) - sum(self._counted_before.values())
        return int(counted)

    def listed(self) -> list[Member]:
        """Instances, in order of ids, and the controller."""
        return [self.members[instance_id] for instance_id in sorted(self.members)]

    def urls(self) -> list[str]:
        """Of routers that are ready."""
        return [
            member.http_url
            for member in self.listed()
            if member.role == "router" and member.state == "ready" and member.http_url
        ]

    def grpc_addresses(self) -> list[str]:
        """Of routers that are ready."""
        return [
            member.grpc_address
            for member in self.listed()
            if member.role == "router" and member.state == "ready" and member.grpc_address
        ]

    async def whole(self, wanted: Sequence[str], timeout_s: float) -> bool:
        """Whether each of `wanted` is ready, or was within `timeout_s`."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout_s), self._looked:
                await self._looked.wait_for(lambda: self._is_whole(wanted))
        return self._is_whole(wanted)

    def _is_whole(self, wanted: Sequence[str]) -> bool:
        return all(name in self.members and self.members[name].state == "ready" for name in wanted)

    async def _look_forever(self) -> None:
        while True:
            await asyncio.sleep(_PERIOD_S)
            await self._look()
            async with self._looked:
                self._looked.notify_all()

    async def _count_forever(self) -> None:
        while True:
            await asyncio.sleep(_FIGURES_PERIOD_S)
            await self._count()
            self._measure()

    async def _look(self) -> None:
        listed: worker_pb2.InstanceList | None = None
        async with grpc.aio.insecure_channel(self._address) as channel:
            with contextlib.suppress(grpc.aio.AioRpcError):
                listed = await worker_pb2_grpc.RegistryStub(channel).GetCluster(
                    worker_pb2.GetClusterRequest(), timeout=_LOOK_TIMEOUT_S
                )
        if listed is None:
            self._note(Member(instance_id=CONTROLLER, role=CONTROLLER, state=""))
            # It may be back elsewhere.
            with contextlib.suppress(BatonError):
                self._address = (await asyncio.to_thread(read_run_state, self._state.name)).registry_address
            return
        was_away = self.is_registry_away or CONTROLLER not in self.members
        self.is_registry_away = False
        pid = await asyncio.to_thread(listener_pid, self._address) if was_away else None
        before = self.members.get(CONTROLLER)
        ranks = (Rank(pid, self._address.rpartition(":")[0]),) if pid else before.ranks if before else ()
        incarnation = listed.incarnation.hex() or "".join(str(rank.pid) for rank in ranks)
        found = {status.instance_id: member_of(status) for status in listed.instances}
        for member in found.values():
            self._note(member)
        for gone in set(self.members) - set(found) - {CONTROLLER}:
            # A registry that has just begun does not know everybody.
            if not listed.is_partial:
                self._note(Member(instance_id=gone, role=self.members[gone].role, state=""))
        self._note(Member(instance_id=CONTROLLER, role=CONTROLLER, incarnation=incarnation, ranks=ranks))

    def _note(self, member: Member) -> None:
        before = self.members.get(member.instance_id)
        if member.instance_id == CONTROLLER:
            self.is_registry_away = member.state == ""
        self.members[member.instance_id] = member
        if before is None or (before.state, before.incarnation) != (member.state, member.incarnation):
            self.changes.append(Change(self._now_s(), member.instance_id, member.incarnation, member.state))

    async def _count(self) -> None:
        routers = [
            # Not through their door: where several share it, anyone of them answers.
            (m.instance_id, m.incarnation, m.metrics_url)
            for m in self.listed()
            if m.role == "router" and m.metrics_url
        ]
        async with httpx.AsyncClient(timeout=_LOOK_TIMEOUT_S, trust_env=False) as client:
            for instance_id, incarnation, url in routers:
                with contextlib.suppress(httpx.HTTPError):
                    text = (await client.get(url)).text
                    self._counted[instance_id, incarnation] = sum(float(found) for found in _RESUMES.findall(text))

    def _measure(self) -> None:
        for member in self.listed():
            for rank in member.ranks:
                resident = resident_bytes(rank.pid) if is_local(rank.host) else 0
                if resident:
                    taken = self.samples.setdefault((member.instance_id, rank.pid), [])
                    taken.append(Sample(self._now_s(), resident, descriptors(rank.pid)))
