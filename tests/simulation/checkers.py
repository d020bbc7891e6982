"""What must hold at the end of a run. What must hold at each step is checked in `cluster.py` and `model.py`.

check_answers   each client's tokens are the oracle's, one end each, within its deadline; and where nothing but
                faults that are over stood in the way, there is an answer
check_at_rest   a lease and a second later: no block is owned, no map, claim, task or staging buffer is left
"""

from __future__ import annotations

import asyncio
from typing import Any

from tests.simulation.clients import Client
from tests.simulation.cluster import SimCluster
from tests.simulation.faults import Faults
from tests.simulation.model import expected_answer
from tests.simulation.process import Process
from tests.simulation.scenario import Scenario
from tests.simulation.world import Violation, World

from baton.decode_worker.worker import DecodeWorker
from baton.engine.block_journal import block_keys
from baton.errors import QuarantinedError
from baton.kv_transfer.sender_link import SenderLink
from baton.prefill_worker.worker import PrefillWorker
from baton.router.block_feed import Freshness

__all__ = ["check_answers", "check_at_rest"]

_SLACK_S = 1.0
# Tasks that live as long as their process does, by the beginning of their names.
_STANDING_TASKS = (
    "main",
    "announce",
    "watch",
    "readiness",
    "link decode-",
    "tell peers",
    "hear peers",
    "follow prefill-",
    "silence of ",
    "beats",
    "watchdog",
    "read router-",
    "requests /baton.v1.Decode/Stream",
    "serve /baton.v1.Decode/Stream",
    "serve /baton.v1.Handover/Ship",
    "serve /baton.v1.Registry/",
    "serve /baton.v1.Worker/Follow",
    "baton-receiver-leases",
    "baton-sender-leases",
)


def check_answers(world: World, scenario: Scenario, clients: list[Client], faults: Faults) -> None:
    """Stream linearity and bounded recovery.

    Raises:
        Violation: see the text.
    """
    length = scenario.config.model.max_model_len or 0
    for client in clients:
        plan, told = client.plan, client.told
        tokens, reason = expected_answer(plan.prompt, plan.sampling, length)
        if told.tokens != tokens[: len(told.tokens)]:
            raise Violation("the stream is exact", f"{plan.name} got {told.tokens}, and {tokens} is right")
        if told.finish is not None:
            if told.tokens != tokens or told.finish != reason or told.num_ends != 1:
                raise Violation(
                    "the stream is exact",
                    f"{plan.name} got {told.num_ends} ends ({told.finish}) after {told.tokens}, right is {reason} after"
                    f" {tokens}",
                )
            if told.completion_tokens != len(tokens):
                raise Violation("the stream is exact", f"{plan.name} is told {told.completion_tokens} tokens of usage")
        if told.end_s is None:
            raise Violation("bounded recovery", f"{plan.name} has not ended: {len(told.tokens)} tokens")
        slack_s = _SLACK_S + sum(f.duration_s for f in scenario.faults) + plan.read_s * len(tokens)
        if told.end_s > client.deadline_s + slack_s:
            raise Violation("bounded recovery", f"{plan.name} ended {told.end_s - client.deadline_s:.2f} s too late")
        if told.finish is None and not told.has_left:
            _check_error(client, faults)


def _check_error(client: Client, faults: Faults) -> None:
    plan, error = client.plan, client.told.error
    if isinstance(error, QuarantinedError) and faults.num_losses >= 2:
        return
    if not plan.is_ample:
        return
    raise Violation("bounded recovery", f"{plan.name} failed with {type(error).__name__}: {error}")


def check_at_rest(cluster: SimCluster) -> None:
    """No request is left anywhere.

    Raises:
        Violation: what is left, and where.
    """
    for process, engine in cluster.engines.items():
        if process.is_dead:
            continue
        engine.check_books()
        owned = engine.pool.counts().owned
        if owned:
            left = [f"{seq.key} {seq.state.value} {seq.block_ids}" for seq in engine.scheduler.sequences()]
            raise Violation("no block stays owned", f"{process.name} owns {owned} blocks: {left}")
        _expect_empty(process, "sequences", engine.scheduler.sequences())
        _expect_empty(process, "samplers", engine._samplers)
    for process, worker in cluster.workers.items():
        if not process.is_dead:
            _check_decode(process, worker) if isinstance(worker, DecodeWorker) else _check_prefill(process, worker)
    for process, frontend in cluster.frontends.items():
        if not process.is_dead:
            _check_router(process, frontend)
    _check_indexes(cluster)
    for link in cluster.payloads.send_links:
        if not link.process.is_dead and not link.is_closed:
            _expect_empty(link.process, "staged bytes", link.staged_bytes)
    for process in cluster.processes.values():
        if not process.is_dead:
            _check_tasks(process)
    if cluster.world.problems:
        raise cluster.world.problems[0]


def _expect_empty(process: Process, what: str, found: Any) -> None:
    if found:
        raise Violation("no request without a state", f"{process.name} has {what} left: {found}")


def _check_decode(process: Process, worker: DecodeWorker) -> None:
    receiver = worker.reservations.receiver
    _expect_empty(process, "live requests", worker._live)
    _expect_empty(process, "session keys", [session.keys for session in worker._sessions if session.keys])
    _expect_empty(process, "reservations", worker.reservations._open)
    for name in ("_reservations", "_by_id", "_waiting", "_asked"):
        _expect_empty(process, f"receiver.{name}", getattr(receiver, name))
    _expect_empty(process, "payloads in flight", sum(link._num_in_flight for link in receiver._links))


def _check_prefill(process: Process, worker: PrefillWorker) -> None:
    _expect_empty(process, "live prompts", worker._live)
    _expect_empty(process, "shipments", worker.shipments._live)
    _expect_empty(process, "tags", worker.shipments._tags)
    _expect_empty(process, "open shipments", worker.shipments.own._open)
    _expect_empty(process, "early rows", worker.shipments.own._early)
    _expect_empty(process, "sender shipments", worker.sender._shipments)
    for task in worker.sender._links.values():
        if task.done() and not task.cancelled() and isinstance(link := task.result(), SenderLink):
            _expect_empty(process, "shipments of a link", link.shipments)


def _check_router(process: Process, frontend: Any) -> None:
    dispatcher, admission = frontend.dispatcher, frontend.client._gate
    _expect_empty(process, "admitted requests", admission.num_requests)
    _expect_empty(process, "admitted tokens", admission.num_tokens)
    _expect_empty(process, "queued requests", admission.num_queued)
    _expect_empty(process, "running requests", frontend.client._running)
    _expect_empty(process, "background tasks", dispatcher._background)
    for link in dispatcher._links.values():
        for name in ("_live", "_numbers", "_numbered"):
            _expect_empty(process, f"link.{name}", getattr(link, name))
    for instance in frontend.table.all():
        claims = instance.own_requests, instance.own_prefill_tokens
        _expect_empty(process, f"claims on {instance.instance_id}", any(claims) and claims)


def _check_indexes(cluster: SimCluster) -> None:
    """Every router that hears a worker knows which blocks it holds."""
    held = {
        worker._runtime.incarnation: set(block_keys(cluster.engines[process].pool.names()))
        for process, worker in cluster.workers.items()
        if process.is_running
    }
    for process, frontend in cluster.frontends.items():
        index = frontend.dispatcher.news.index
        for instance in frontend.table.all() if process.is_running else ():
            name, known = instance.instance_id, held.get(instance.status.incarnation)
            if known is None or not (instance.is_followed or (instance.connected and instance.status.role == "decode")):
                continue
            if index.freshness(name) is not Freshness.SYNCED:
                raise Violation("the index follows", f"{process.name} is not in sync with {name}: {index.reason(name)}")
            if index.held(name) != known:
                extra, missing = len(index.held(name) - known), len(known - index.held(name))
                raise Violation(
                    "the index follows",
                    f"of the blocks of {name} {process.name} misses {missing}, has {extra} too many",
                )


def _check_tasks(process: Process) -> None:
    left = [
        f"{task.get_name()} ({_code(task)})"
        for task in asyncio.all_tasks(process.loop)
        if not task.get_name().startswith(_STANDING_TASKS) and not _is_standing(task)
    ]
    # Waits with a deadline, of tasks that stand.
    waits = [name for name in left if name.endswith("(Event.wait)")]
    _expect_empty(process, "tasks", sorted(left) if len(waits) > _STANDING_WAITS else sorted(set(left) - set(waits)))


_STANDING_WAITS = 6
_STANDING_CODE = (
    "Announcer.run",
    "watch_registry",
    "watch_state",
    "_listen",
    "_expire_forever",
    "HandoverReceiver._read",
    "SenderLink._write",
    "SenderLink._read",
    "_server_stopping",
    "Call._poll",
    "HandoverSender.link",
    "HandoverSender._try",
    "HandoverSender._start",
    "warm_links",
    "async_generator_athrow",
)


def _is_standing(task: asyncio.Task[Any]) -> bool:
    return _code(task).endswith(_STANDING_CODE)


def _code(task: asyncio.Task[Any]) -> str:
    coro = task.get_coro()
    return getattr(coro, "__qualname__", type(coro).__name__)
