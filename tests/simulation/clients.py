"""Clients: each sends its request to a router that takes it, reads the answer, and notes what it was told.

A client lives in its router's process, in the place of an HTTP handler, and reads through `GenerationClient`. As a real
client does, it tries again what was refused before it began (503, 429) until its deadline, and goes to another router
when its own dies; what it then gets is a new answer, from the first token on.
"""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import Any

from tests.simulation.cluster import SimCluster
from tests.simulation.process import Process
from tests.simulation.scenario import PlannedRequest

from baton.errors import BatonError, OverloadedError, UnavailableError
from baton.router.validation import ChoiceSpec, GenerationSpec

__all__ = ["Client", "Told"]

_TRY_AGAIN_S = 0.2
_STOP_S = 0.3


@dataclass(slots=True)
class Told:
    """What a client has been told by the router that it asked last.

    Attributes:
        finish: the finish reason, once there was one.
        error: the error that ended it.
        has_left: the client went by itself.
        end_s: when it was over.
    """

    tokens: list[int] = field(default_factory=list)
    finish: str | None = None
    num_ends: int = 0
    completion_tokens: int = 0
    error: BatonError | None = None
    has_left: bool = False
    end_s: float | None = None


class _Sink:
    """Takes plain tokens, as the direct HTTP path does."""

    is_open = True

    def __init__(self, client: Client, told: Told) -> None:
        self._client = client
        self._told = told

    def write(self, text: str, token_id: int) -> None:
        """See `TokenSink`."""
        del text
        self._told.tokens.append(token_id)
        self._client.note(f"reads {token_id} at once")


class Client:
    """One client with one request.

    Attributes:
        told: by the router that it asked last.
        num_tries, num_restarts: how often it was refused, and how often its router died under it.
        begun_s: when it first asked.
    """

    def __init__(self, cluster: SimCluster, plan: PlannedRequest) -> None:
        self._cluster = cluster
        self._world = cluster.world
        self.plan = plan
        self.told = Told()
        self.num_tries = 0
        self.num_restarts = 0
        self.num_tasks = 0
        self._has_settled = False
        self._router: Process | None = None
        self._task: asyncio.Task[None] | None = None
        cluster.num_open += 1
        self._world.at(plan.time_s, self._ask)
        if plan.leave_s != float("inf"):
            self._world.at(plan.time_s + plan.leave_s, self._leave)

    @property
    def is_over(self) -> bool:
        """It has an answer, an error, or has gone."""
        return self.told.end_s is not None

    @property
    def deadline_s(self) -> float:
        """In virtual time."""
        return self.plan.time_s + self.plan.timeout_s

    def note(self, what: str) -> None:
        """A detail of the trace."""
        self._world.log(f"{self.plan.name} {what}", "client", is_detail=True)

    def _end(self) -> None:
        if self.told.end_s is None:
            self.told.end_s = self._world.now_s
            self._cluster.num_open -= 1
            told = self.told
            how = "left" if told.has_left else told.finish or f"{type(told.error).__name__}: {told.error}"
            self._world.log(f"{self.plan.name} ends after {len(told.tokens)} tokens: {how}", "client")

    def _has_left(self) -> None:
        """It went by itself: where nothing is wrong, its work ends within a step or two."""
        faults = self._cluster.scenario.faults
        if all(fault.time_s > self._world.now_s + _STOP_S for fault in faults):
            self._world.after(_STOP_S, self._expect_no_work)

    def _expect_no_work(self) -> None:
        for process, engine in self._cluster.engines.items():
            left = [seq for seq in engine.scheduler.sequences() if seq.key[0].startswith(f"{self.plan.name}-")]
            if left and not process.is_dead:
                self._world.fail(
                    "a client that left costs nothing more",
                    f"{process.name} works for {self.plan.name}, {_STOP_S} s after it left: {left[0].state.value}",
                )

    def _leave(self) -> None:
        if self.is_over:
            return
        self.told.has_left = True
        self._world.log(f"{self.plan.name} leaves after {len(self.told.tokens)} tokens", "client")
        if self._task is not None and self._router is not None and not self._router.is_dead:
            self._router.loop.call_soon(self._task.cancel)
        self._end()
        self._has_left()

    def _ask(self) -> None:
        """Finds a router and sends the request."""
        if self.is_over:
            return
        ready = [
            router
            for router in self._cluster.alive("router")
            if router in self._cluster.frontends and self._cluster.frontends[router].ready and not router.is_paused
        ]
        if not ready:
            if self._world.now_s >= self.deadline_s:
                self.told.error = UnavailableError("no router is ready")
                self._end()
            else:
                self._world.after(_TRY_AGAIN_S, self._ask)
            return
        index = (len(self.plan.prompt) + self.num_restarts) % len(ready)
        router = self._router = ready[index]
        self.told = Told()
        self._has_settled = False
        frontend = self._cluster.frontends[router]
        remaining_s = self.deadline_s - self._world.now_s

        def begin() -> None:
            self._task = router.loop.create_task(self._consume(frontend, remaining_s), name=f"client {self.plan.name}")
            self._task.add_done_callback(lambda _: self._settled(router))

        router.loop.call_soon(begin)
        self.num_tasks += 1
        number = self.num_tasks
        router.on_death.append(lambda: self._router_died(number))

    def _router_died(self, number: int) -> None:
        """The router that was asked `number`th is dead."""
        if number == self.num_tasks and not self._has_settled and not self.is_over:
            self.num_restarts += 1
            self._world.after(_TRY_AGAIN_S, self._ask)

    def _settled(self, router: Process) -> None:
        if router.is_dead or self.is_over:
            return
        self._has_settled = True
        told, now_s = self.told, self._world.now_s
        is_refused = isinstance(told.error, (OverloadedError, UnavailableError)) and not told.tokens
        if is_refused and now_s + _TRY_AGAIN_S < self.deadline_s:
            self.num_tries += 1
            self._world.after(_TRY_AGAIN_S, self._ask)
            return
        self._end()

    async def _consume(self, frontend: Any, timeout_s: float) -> None:
        plan, told = self.plan, self.told
        spec = GenerationSpec(
            request_id=plan.name,
            choices=(ChoiceSpec(index=0, prompt_token_ids=plan.prompt, sampling=plan.sampling),),
            n=1,
            priority=plan.priority,
        )
        sink = _Sink(self, told) if plan.uses_sink and plan.sampling.logprobs is None else None
        deltas = frontend.client.generate(spec, timeout_s=timeout_s, sink=sink)
        try:
            async with contextlib.aclosing(deltas):
                async for delta in deltas:
                    told.tokens += delta.token_ids
                    self.note(f"reads {delta.token_ids}")
                    told.completion_tokens = delta.completion_tokens
                    if delta.finish_reason is not None:
                        told.num_ends += 1
                        told.finish = delta.finish_reason
                    if plan.leave_tokens and len(told.tokens) >= plan.leave_tokens and told.finish is None:
                        told.has_left = True
                        self._has_left()
                        return
                    if plan.read_s:
                        await asyncio.sleep(plan.read_s)
        except BatonError as error:
            told.error = error
