"""A whole run against a running cluster: expected tokens, load and faults side by side, recovery, what is left.

expect --> load + strikes for `duration_s` --> requests end --> everybody ready again --> blocks settled --> Report
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence, Set
from contextlib import AsyncExitStack
from dataclasses import replace

from baton.cluster.chaos.load import Load
from baton.cluster.chaos.members import Member, has_spare, refusal
from baton.cluster.chaos.observer import Observer
from baton.cluster.chaos.processes import is_local
from baton.cluster.chaos.report import Facts, Report
from baton.cluster.chaos.scenarios import Kill, Rules, Scenario, Stop, Strike, strikes_of
from baton.cluster.chaos.striker import Striker
from baton.cluster.chaos.vanish import Vanishers
from baton.cluster.client import get_cluster
from baton.cluster.run_state import RunState
from baton.errors import ConfigError, UnavailableError

__all__ = ["SETTLE_S", "ChaosRun", "run_chaos"]

SETTLE_S = 31.0
"""The lease of a reservation as it comes, and a second."""
_READY_S = 90.0
_POLL_S = 0.1


class ChaosRun:
    """What load, faults and looks share. A context manager; `load.begin` starts the clock of all.

    Raises:
        UnavailableError: the cluster does not run, or is not ready.
    """

    def __init__(self, state: RunState, *, max_tokens: int = 96) -> None:
        if not state.ready:
            raise UnavailableError(f"{state.name} is still starting; `baton status --name {state.name}` shows how far")
        self.state = state
        self.observer = Observer(state, now_s=lambda: self.load.now_s())
        self.load = Load(self.observer.urls, model=state.model, api_key=state.api_key, max_tokens=max_tokens)
        self.vanishers = Vanishers(
            self.observer.urls, self.observer.grpc_addresses, model=state.model, api_key=state.api_key
        )
        self.striker = Striker(self.observer, self.vanishers, now_s=self.load.now_s)
        self.wanted: tuple[str, ...] = ()
        self._workers: frozenset[str] = frozenset()
        self._stack = AsyncExitStack()

    async def __aenter__(self) -> ChaosRun:
        await self._stack.enter_async_context(self.observer)
        await self._stack.enter_async_context(self.load)
        self.wanted = tuple(self.observer.members)
        self._workers = frozenset(m.instance_id for m in self.observer.listed() if m.role in ("prefill", "decode"))
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._stack.aclose()

    def begin(self) -> None:
        """Everything that is told is told from now on, and times count from now."""
        self.load.begin()
        self.observer.forget_past()

    async def check(self, scenario: Scenario) -> None:
        """See to it that the scenario can be done.

        Raises:
            ConfigError, UnavailableError: it cannot; the text says how it could.
        """
        if why_not := refusal(scenario, self.observer.listed(), is_local, self.state.launcher):
            raise ConfigError(why_not)
        await self.striker.check([scenario])

    async def recover(self) -> bool:
        """Wait until everybody is ready again, at most `_READY_S`."""
        return await self.observer.whole(self.wanted, _READY_S)

    async def settle(self, limit_s: float) -> tuple[dict[str, int], float | None]:
        """(blocks owned by worker, seconds until there were none), as the workers themselves say; None: they remain."""
        began_s = time.monotonic()
        while True:
            owned = await asyncio.to_thread(owned_blocks, self.observer.registry_address, self._workers)
            took_s = time.monotonic() - began_s
            if owned is not None and not any(owned.values()):
                return owned, took_s
            if took_s > limit_s:
                return owned or {}, None
            await asyncio.sleep(_POLL_S)

    def facts(
        self,
        title: str,
        *,
        duration_s: float,
        clients: int,
        owned: dict[str, int],
        settle_s: float | None,
        settle_limit_s: float = SETTLE_S,
    ) -> Facts:
        """All that was seen."""
        listed = self.observer.members
        return Facts(
            title=title,
            duration_s=duration_s,
            clients=clients,
            outcomes=tuple(self.load.outcomes),
            strikes=tuple(self.striker.records),
            changes=tuple(self.observer.changes),
            undisturbed_wait_s=self.load.undisturbed_wait_s,
            resumes=self.observer.resumes,
            members=[listed.get(name, Member(instance_id=name, role="", state="not listed")) for name in self.wanted],
            owned=owned,
            settle_s=settle_s,
            settle_limit_s=settle_limit_s,
            left=self.vanishers.left,
        )


def owned_blocks(registry_address: str, workers: Set[str]) -> dict[str, int] | None:
    """KV blocks that some request owns, by worker, as each says itself; None where one does not say."""
    try:
        view = get_cluster(registry_address)
    except UnavailableError:
        return None
    owned = {
        status.instance_id: status.load.kv_blocks_owned
        for status in view.instances.instances
        if status.instance_id in workers and status.state == "ready" and status.instance_id not in view.unreachable
    }
    return owned if set(owned) == workers else None


async def run_chaos(
    state: RunState,
    scenario: Scenario,
    *,
    duration_s: float,
    clients: int,
    seed: int,
    settle_limit_s: float,
    is_steady: bool = False,
    tell: Callable[[str], None],
) -> Report:
    """One scenario from beginning to end.

    Raises:
        ConfigError, UnavailableError: it cannot be done to this cluster.
    """
    strikes: Sequence[Strike] = strikes_of(scenario, duration_s=duration_s, seed=seed, is_steady=is_steady)
    async with ChaosRun(state) as run:
        await run.check(scenario)
        listed = run.observer.listed()
        tell("asking for every answer once, with nobody disturbed")
        await run.load.expect()
        how_often = "all along" if is_steady else f"{len(strikes)} times"
        tell(f"{clients} clients, {scenario.name} {how_often} within {duration_s:.0f} s")
        run.begin()
        stop = asyncio.Event()
        async with asyncio.TaskGroup() as tasks:
            for number in range(clients):
                tasks.create_task(run.load.client(number, stop))
            striking = asyncio.create_task(run.striker.run(strikes))
            try:
                await asyncio.sleep(duration_s)
                await striking
            finally:
                stop.set()
                striking.cancel()
        tell("waiting until everybody is ready and every block has settled")
        ended_s = time.monotonic()
        await run.recover()
        owned, settle_s = await run.settle(max(0.0, settle_limit_s - (time.monotonic() - ended_s)))
        if settle_s is not None:
            settle_s = time.monotonic() - ended_s
        await run.recover()  # told of is what the last look has seen, and that may have been in vain
        facts = run.facts(
            scenario.name,
            duration_s=duration_s,
            clients=clients,
            owned=owned,
            settle_s=settle_s,
            settle_limit_s=settle_limit_s,
        )
    act = scenario.act
    role = act.role if isinstance(act, Kill | Stop) else act.victim if isinstance(act, Rules) else ""
    if not has_spare(listed, role):
        facts = replace(facts, has_spare=False)
    return Report.of(facts)
