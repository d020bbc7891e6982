"""Puts faults into a cluster and takes them back, whatever happens meanwhile.

Kills and stops are signals to processes of this host; rules travel through Worker.SetFaults to every router and
worker, and to one that is started anew while they hold. A cluster that does not allow rules at run time refuses
them, and says how to allow them.
"""

from __future__ import annotations

import asyncio
import signal
from collections import Counter
from collections.abc import Callable, Sequence

import grpc

from baton.cluster.chaos.members import CONTROLLER, Member, choose_victim
from baton.cluster.chaos.observer import Observer
from baton.cluster.chaos.processes import send_signal
from baton.cluster.chaos.report import StrikeRecord
from baton.cluster.chaos.scenarios import Kill, Leave, Rules, Scenario, Stop, Strike
from baton.cluster.chaos.vanish import Vanishers
from baton.errors import UnavailableError

__all__ = ["Striker", "set_faults"]

_SET_TIMEOUT_S = 2.0
_SET_TRIES = 10
_PERIOD_S = 0.2
_VICTIM_S = 4.0


async def set_faults(address: str, rules: Sequence[str]) -> bool:
    """Have the worker at `address` follow `rules` and no others; whether it was reached.

    Raises:
        UnavailableError: it does not allow that.
    """
    async with grpc.aio.insecure_channel(address) as channel:
        from baton.proto.baton.v1 import worker_pb2, worker_pb2_grpc

        stub = worker_pb2_grpc.WorkerStub(channel)
        for _ in range(_SET_TRIES):
            try:
                await stub.SetFaults(worker_pb2.SetFaultsRequest(rules=rules), timeout=_SET_TIMEOUT_S)
            except grpc.aio.AioRpcError as error:
                if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    # Its process is gone, or the rules themselves hit this message.
                    await asyncio.sleep(_PERIOD_S)
                    continue
                raise UnavailableError(
                    f"{address} takes no faults ({error.code().name}: {error.details()});"
                    " start the cluster with --set faults.allow_at_runtime=true"
                ) from error
            return True
    return False


class Striker:
    """Carries out strikes on what `observer` sees, times as `now_s` tells them; what was done is in `records`."""

    def __init__(self, observer: Observer, vanishers: Vanishers, *, now_s: Callable[[], float]) -> None:
        self._observer = observer
        self._vanishers = vanishers
        self._now_s = now_s
        self._turns: Counter[str] = Counter()
        self.records: list[StrikeRecord] = []

    async def check(self, scenarios: Sequence[Scenario]) -> None:
        """Ask every worker whether it takes rules, where a scenario has some.

        Raises:
            UnavailableError: one does not.
        """
        if any(isinstance(scenario.act, Rules) for scenario in scenarios):
            for member in self._served():
                await set_faults(member.address, ())

    async def run(self, strikes: Sequence[Strike]) -> None:
        """Each strike at its time; returns when the last one is lifted."""
        async with asyncio.TaskGroup() as tasks:
            for strike in strikes:
                await asyncio.sleep(max(0.0, strike.at_s - self._now_s()))
                tasks.create_task(self.perform(strike))

    async def perform(self, strike: Strike) -> StrikeRecord:
        """One strike, from its beginning until it is lifted."""
        act = strike.scenario.act
        if isinstance(act, Kill):
            record = await self._kill(strike, act.role)
        elif isinstance(act, Stop):
            record = await self._stop(strike, act.role)
        elif isinstance(act, Rules):
            record = await self._follow(strike, act)
        else:
            record = await self._leave(strike, act)
        self.records.append(record)
        self.records.sort(key=lambda each: each.began_s)
        return record

    async def _kill(self, strike: Strike, role: str) -> StrikeRecord:
        victim = await self._victim(role)
        now_s = self._now_s()
        if victim is None:
            return _nobody(strike, role, now_s)
        rank = victim.ranks[strike.seed % len(victim.ranks)]
        was_there = send_signal(rank.pid, signal.SIGKILL)
        return StrikeRecord(
            scenario=strike.scenario.name,
            began_s=now_s,
            instance_id=victim.instance_id,
            incarnation=victim.incarnation,
            is_kill=True,
            was_done=was_there,
            note=f"SIGKILL to process {rank.pid}" + ("" if was_there else ", which had just ended"),
        )

    async def _stop(self, strike: Strike, role: str) -> StrikeRecord:
        victim = await self._victim(role)
        began_s = self._now_s()
        if victim is None:
            return _nobody(strike, role, began_s)
        pids = [rank.pid for rank in victim.ranks]
        try:
            for pid in pids:
                send_signal(pid, signal.SIGSTOP)
            await asyncio.sleep(strike.scenario.hold_s)
        finally:
            for pid in pids:
                send_signal(pid, signal.SIGCONT)
        return StrikeRecord(
            scenario=strike.scenario.name,
            began_s=began_s,
            instance_id=victim.instance_id,
            incarnation=victim.incarnation,
            lifted_s=self._now_s(),
            note=f"SIGSTOP to {', '.join(map(str, pids))} for {strike.scenario.hold_s:g} s",
        )

    async def _follow(self, strike: Strike, act: Rules) -> StrikeRecord:
        victim = await self._victim(act.victim) if act.victim else None
        began_s = self._now_s()
        if act.victim and victim is None:
            return _nobody(strike, act.victim, began_s)
        rules = strike.rules(victim.instance_id if victim else "")
        told: set[tuple[str, str]] = set()
        try:
            while self._now_s() < began_s + strike.scenario.hold_s:
                for member in self._served():
                    if (member.address, member.incarnation) not in told:
                        told.add((member.address, member.incarnation))
                        await set_faults(member.address, rules)
                await asyncio.sleep(_PERIOD_S)
        finally:
            reached = await asyncio.gather(*(set_faults(address, ()) for address, _ in told), return_exceptions=True)
        lost = sum(answer is not True for answer in reached)
        return StrikeRecord(
            scenario=strike.scenario.name,
            began_s=began_s,
            instance_id=victim.instance_id if victim else "",
            incarnation=victim.incarnation if victim else "",
            lifted_s=self._now_s(),
            note="; ".join(rules)
            + f" for {strike.scenario.hold_s:g} s"
            + (f"; {lost} processes were gone when it was lifted" if lost else ""),
            was_done=bool(told),
        )

    async def _leave(self, strike: Strike, act: Leave) -> StrikeRecord:
        began_s = self._now_s()
        counted = await self._vanishers.leave(act.clients, strike.seed)
        note = ", ".join(f"{count} {phase}" for phase, count in sorted(counted.items()))
        return StrikeRecord(scenario=strike.scenario.name, began_s=began_s, lifted_s=self._now_s(), note=note)

    async def _victim(self, role: str) -> Member | None:
        """Whom to hit; waits for somebody to come back where none can be spared."""
        until_s = self._now_s() + _VICTIM_S
        while True:
            victim = choose_victim(self._observer.listed(), role, self._turns[role])
            if victim is not None and victim.ranks and not (role == CONTROLLER and self._observer.is_registry_away):
                self._turns[role] += 1
                return victim
            if self._now_s() >= until_s:
                return None
            await asyncio.sleep(_PERIOD_S)

    def _served(self) -> list[Member]:
        """Who has a Worker service."""
        return [member for member in self._observer.listed() if member.address and member.state == "ready"]


def _nobody(strike: Strike, role: str, now_s: float) -> StrikeRecord:
    return StrikeRecord(
        scenario=strike.scenario.name,
        began_s=now_s,
        was_done=False,
        note=f"left out: no {role} could be spared",
    )
