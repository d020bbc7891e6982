"""Runs seeds. One run: start the cluster, let requests and faults happen, wait until all is over, check."""

from __future__ import annotations

import contextlib
import gc
import logging
import random
from collections.abc import Iterator
from dataclasses import dataclass

from tests.simulation.checkers import check_answers, check_at_rest
from tests.simulation.clients import Client
from tests.simulation.cluster import SimCluster
from tests.simulation.faults import Faults
from tests.simulation.mutations import Mutation
from tests.simulation.scenario import AMPLE_S, Scenario
from tests.simulation.stand_ins import no_output, standing_in
from tests.simulation.world import Violation, World

__all__ = ["Outcome", "forget_runs", "run_seed"]

_LIMIT_S = 20.0 + AMPLE_S
_EVERY_COLLECTION = 32
_runs_since_collection = 0


@dataclass(slots=True)
class Outcome:
    """What came of a run.

    Attributes:
        violation: the broken promise, None where all were kept.
        transcript: the last events, where one was broken or the trace was asked for.
    """

    seed: int
    trace_hash: int
    virtual_s: float
    num_events: int
    num_steps: int
    num_faults: int
    ends: dict[str, int]
    violation: Violation | None = None
    transcript: str = ""
    scenario: str = ""


class _LogToTrace(logging.Handler):
    """Lines of the product's log become lines of the trace; a logged exception is a bug."""

    def __init__(self, world: World) -> None:
        super().__init__(logging.DEBUG)
        self._world = world

    def emit(self, record: logging.LogRecord) -> None:
        """See logging."""
        if self._world.current is not None and self._world.current.is_dead:
            return
        self._world.log(f"[{record.levelname.lower()}] {record.getMessage()}")
        if record.exc_info and record.exc_info[0] is not None:
            kind, error = record.exc_info[0], record.exc_info[1]
            self._world.fail("no stray exception", f"logged: {record.getMessage()}: {kind.__name__}: {error}")


def run_seed(seed: int, *, trace: bool = False, mutation: Mutation | None = None) -> Outcome:
    """Simulates one seed."""
    scenario = Scenario.draw(seed)
    world = World(seed, keep_trace=trace)
    sim = SimCluster(world, scenario)
    random.seed(seed)
    with (
        _no_collection(),
        _log_in(world, trace),
        standing_in(sim),
        contextlib.nullcontext() if mutation is None else mutation.make(),
    ):
        faults = Faults(sim)
        clients = [Client(sim, request) for request in scenario.requests]
        violation = _run(sim, clients, faults)
        for process in sim.all_processes:
            process.kill("")
            process.end_threads()
    outcome = Outcome(
        seed=seed,
        trace_hash=world.trace_hash,
        virtual_s=world.now_s,
        num_events=world.num_events,
        num_steps=sum(engine.num_steps for engine in sim.engines.values()),
        num_faults=faults.num_happened,
        ends=_count_ends(clients),
        violation=violation,
        transcript=world.transcript() if trace or violation is not None else "",
        scenario=scenario.describe(),
    )
    _collect()
    return outcome


def _run(sim: SimCluster, clients: list[Client], faults: Faults) -> Violation | None:
    world, scenario = sim.world, sim.scenario

    def is_over() -> bool:
        return not sim.num_open and world.now_s > faults.healed_s

    try:
        sim.start()
        world.run(_LIMIT_S, is_over)
        check_answers(world, scenario, clients, faults)
        world.run(world.now_s + _rest_s(scenario))
        check_at_rest(sim)
    except Violation as violation:
        return violation
    return None


@contextlib.contextmanager
def _no_collection() -> Iterator[None]:
    """What is dropped half-way says so when it is collected; that must not depend on how much was allocated before."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


@contextlib.contextmanager
def _log_in(world: World, is_full: bool) -> Iterator[None]:
    """The product's log goes to the trace."""
    handler, logger = _LogToTrace(world), logging.getLogger("baton")
    before = logger.level, logger.propagate
    logger.setLevel(logging.DEBUG if is_full else logging.WARNING)
    logger.propagate = False
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before[0])
        logger.propagate = before[1]


def _rest_s(scenario: Scenario) -> float:
    """How long after the last request nothing may be owned any more: a lease and a second."""
    return scenario.config.transfer.lease_s + 1.0


def _count_ends(clients: list[Client]) -> dict[str, int]:
    ends: dict[str, int] = {}
    for client in clients:
        told = client.told
        how = "left" if told.has_left else told.finish or type(told.error).__name__
        ends[how] = ends.get(how, 0) + 1
    return ends


def _collect() -> None:
    """Now and then drop what is left of earlier runs: coroutines that were stopped half-way."""
    global _runs_since_collection
    _runs_since_collection = (_runs_since_collection + 1) % _EVERY_COLLECTION
    if not _runs_since_collection:
        with no_output():
            gc.collect()


def forget_runs() -> None:
    """Drop what is left of earlier runs, in silence; before the interpreter does it."""
    with no_output():
        for _ in range(3):
            gc.collect()
