"""Sends requests to workers and brings their tokens back: the thin shell around `policy`.

For each request: choose the pair; Submit to the decode worker and Prefill to the prefill worker go out together; a
failed prefill is told to the decode worker, which keeps its blocks for another prefill worker, or computes the prompt
itself where there is none; when the consumer stops listening, both halves are cancelled.

`LiveRequest` keeps prompt, emitted tokens and parameters: all that is needed to go on elsewhere. When a decode worker
is lost its requests are dispatched again with the tokens emitted so far, and the consumer sees nothing but time:

    attempt --worker lost, or it gave the request up--> pause (see `retries.py`) --> attempt with prompt + emitted
                                                        wait, while no worker is ready, until the deadline
                                                        judge, if it may have killed two (see `quarantine.py`)

Each of these phases ends at the request's deadline, with an error that says what was waited for, and of whom; and as
soon as the consumer stops listening or the request is aborted.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import random
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import dataclass, field

import grpc

from baton import faults
from baton.engine.block_journal import block_keys
from baton.engine.prefix_cache import block_hashes
from baton.engine.request import EngineRequest, FinishReason, RequestOutput
from baton.errors import BatonError, DeadlineError, QuarantinedError, UnavailableError
from baton.log import annotate
from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import output_from_proto, request_to_proto
from baton.proto.stream_end import is_being_cancelled
from baton.router.channels import is_ping_lost, open_watched_channel
from baton.router.cost_ledger import CostLedger
from baton.router.costs.estimate import estimate_ttft_s
from baton.router.costs.model import CostModel
from baton.router.decisions import Decisions
from baton.router.ejection import EjectionConfig
from baton.router.instances import Instance, InstanceTable
from baton.router.journal import Journal
from baton.router.links import DecodeLink, LinkBrokenError
from baton.router.outliers import Outliers
from baton.router.peers import Peers
from baton.router.policy import choose
from baton.router.quarantine import PROVEN_TOKENS, Quarantine, Verdict
from baton.router.retries import Retries
from baton.router.routing.decision import Decision
from baton.router.routing.facts import InstanceView, RequestFacts
from baton.router.routing.policies import Policy
from baton.router.routing.recent_work import RecentWork
from baton.router.token_queue import TokenQueue
from baton.router.worker_news import WorkerNews
from baton.state.base import SharedState

__all__ = ["Dispatcher", "LiveRequest"]

_log = logging.getLogger(__name__)
_LOOK_AGAIN_S = 0.1
_CONNECT_S = 5.0
"""How long a new request waits for the stream to a worker that is listed."""
_JUDGE_AFTER_S = 1.0
"""In which a worker that only its connection was lost to is connected again, and one that died is listed no more."""
_BOTH_LOST_S = 0.5
"""In which the death of a process shows at a call to it, where its death is why another one died."""
_NOBODY: frozenset[str] = frozenset()
"""One for all decisions, which are kept for a while."""
MAX_PREFILLS = 3
"""Prefill workers that try to compute one prompt, one after another, within the handover's timeout."""
# gRPC's words for a worker that was away before the request came to it: no suspicion falls on the request.
_NEVER_REACHED = "failed to connect"
# Another prefill worker would fail in the same way: the decode worker goes on without, it is too late, a bad request.
_FINAL_CODES = frozenset(
    (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.INVALID_ARGUMENT)
)


@dataclass(slots=True, kw_only=True)
class LiveRequest:
    """One request on its way.

    Attributes:
        request: as first dispatched; `attempt` is the number of the present dispatch.
        emitted_ids: output tokens the consumer has been given.
        deadline_s: on the event loop's clock.
        journal: is told of every attempt.
        decode_instance, prefill_instance: who serves it; equal when the decode worker did both, empty before.
        failed: incarnations of workers on which an attempt broke, by instance id.
        welcomes: how often each worker, by incarnation, had welcomed this router as an attempt began there.
        retries: what has gone wrong so far.
        outputs: what the present attempt's worker says.
        aborted: why the request must end, whatever the workers do.
        is_alone: it may have killed workers, and is tried by itself.
        phase: what is waited for, and of whom, in words.
        tap: offered plain tokens before they come as outputs (see `TokenQueue`); counts what it takes as emitted.
        session_instances: where its session was served before, by role.
        decision: how the present attempt's workers were chosen; None before the first.
        reading: the call to the prefill worker of an attempt that has just broken.
    """

    request: EngineRequest
    deadline_s: float
    journal: Journal
    emitted_ids: list[int] = field(default_factory=list)
    attempt: int = 0
    decode_instance: str = ""
    prefill_instance: str = ""
    failed: dict[str, bytes] = field(default_factory=dict)
    welcomes: dict[bytes, int] = field(default_factory=dict)
    retries: Retries = field(default_factory=Retries)
    outputs: TokenQueue | None = None
    aborted: BatonError | None = None
    is_alone: bool = False
    phase: str = "it was being dispatched"
    tap: Callable[[int], bool] | None = None
    session_instances: Mapping[str, str] = field(default_factory=dict)
    decision: Decision | None = None
    reading: asyncio.Task[None] | None = None

    def abort(self, error: BatonError) -> None:
        """Make the consumer's next wait raise `error`."""
        self.aborted = error
        if self.outputs is not None:
            self.outputs.put(error)


class _Claim:
    """Load that this router puts on an instance, given back exactly once."""

    def __init__(self, instance: Instance, prefill_tokens: int) -> None:
        self._instance = instance
        self._prefill_tokens = prefill_tokens
        self._ended = False
        instance.begin(prefill_tokens)

    def prefill_done(self) -> None:
        """The prompt is computed."""
        self._instance.prefill_done(self._prefill_tokens)
        self._prefill_tokens = 0

    def end(self) -> None:
        """The work is over."""
        if not self._ended:
            self._ended = True
            self.prefill_done()
            self._instance.end()


@dataclass(frozen=True, slots=True)
class _PrefillFailure:
    reason: str
    may_try_again: bool
    has_died: bool = False
    is_silent: bool = False


class Dispatcher:
    """Owns the links to decode workers and the channels to prefill workers.

    Args:
        table: who is there; call `reconcile` after it changed.
        policy: how workers are chosen.
        costs: what serving a request in one way would take; learns from what is dispatched.
        handover_timeout_s: how long a decode worker waits for pages before it prefills itself.
        silence_s: a decode worker that says nothing for so long is lost.
        ejection: when a worker that lives is set aside because it is slow.
        shared: state that other routers see too, where there is one.
        decisions: where what is decided is kept; None: a store of its own.
    """

    def __init__(
        self,
        table: InstanceTable,
        metrics: Metrics,
        *,
        router_id: str,
        policy: Policy,
        costs: CostModel,
        handover_timeout_s: float,
        silence_s: float,
        ejection: EjectionConfig | None = None,
        shared: SharedState | None = None,
        decisions: Decisions | None = None,
    ) -> None:
        self._table = table
        self._outliers = Outliers(table, metrics, ejection or EjectionConfig(), on_abandon=self._abandon)
        self._metrics = metrics
        self._silence_s = silence_s
        self._router_id = router_id
        self._policy = policy
        self.costs = costs
        self._ledger = CostLedger(costs, metrics)
        self._recent = RecentWork()
        self._num_choices = 0
        self._handover_timeout_s = handover_timeout_s
        self.news = WorkerNews(
            metrics,
            router_id=router_id,
            silence_s=silence_s,
            ask=self._ask_for_snapshot,
            on_steps=self._ledger.steps,
            on_load=lambda: self.on_room(),
        )
        self._peers = (
            None if shared is None else Peers(shared, metrics, router_id=router_id, on_choice=self._peer_chose)
        )
        self._quarantine = Quarantine()
        self._links: dict[str, DecodeLink] = {}
        self._channels: dict[str, grpc.aio.Channel] = {}
        self._background: set[asyncio.Task[None]] = set()
        self._closed = False
        self.decisions = decisions if decisions is not None else Decisions()
        """What was decided for the last requests."""
        self.changed = asyncio.Event()
        """Set whenever a worker came or went; whoever waits clears it."""
        self.on_room: Callable[[], None] = _do_nothing
        """Called whenever workers may have room: one came, said how it is, or something there ended or began."""

    @property
    def ready(self) -> bool:
        """Whether at least one decode worker can take a request."""
        return any(view.usable for view in self._table.views() if view.role == "decode")

    def health_of(self, instance_id: str) -> str:
        """Whether a worker is set aside as slow: "healthy", "ejected" or "probing"."""
        return self._outliers.state_of(instance_id)

    def predict_ttft_s(
        self, prompt_token_ids: Sequence[int], cache_salt: str = "", *, limit_s: float = 0.0
    ) -> float | None:
        """When a request would have its first token if it were dispatched now; None while no worker is ready.

        Args:
            limit_s: what matters is whether it is more than this: only where it seems so, the prompt is looked up in
                the workers' caches.
        """
        views = self._table.views()
        facts = RequestFacts(prompt_tokens=len(prompt_token_ids))
        ttft_s = estimate_ttft_s(views, facts, self.costs, self._policy.mode)
        if ttft_s is None or ttft_s <= limit_s:
            return ttft_s
        facts = dataclasses.replace(facts, prefix_blocks=self._prefix_blocks(prompt_token_ids, cache_salt)[1])
        return estimate_ttft_s(views, facts, self.costs, self._policy.mode)

    def reconcile(self) -> None:
        """Open links to new decode workers, drop those of workers that are gone."""
        if self._closed:
            return
        for gone in self._table.prune():
            self.news.forget(gone.instance_id)
            self._recent.forget(gone.instance_id)
        current = {instance.instance_id: instance for instance in self._table.all()}
        self.costs.keep(current)
        for instance_id, link in list(self._links.items()):
            if current.get(instance_id) is not link.instance:
                self.news.forget(instance_id)
                del self._links[instance_id]
                self._spawn(link.close())
        for instance_id, instance in current.items():
            if instance.status.role == "decode" and instance.status.address and instance_id not in self._links:
                link = DecodeLink(
                    instance,
                    router_id=self._router_id,
                    silence_s=self._silence_s,
                    on_change=self._link_changed,
                    on_load=lambda: self.on_room(),
                    sink=self.news,
                )
                self._links[instance_id] = link
                link.start()
        self.news.reconcile(current.values())
        if self._peers is not None:
            self._peers.start()
        wanted = {instance.status.address for instance in current.values() if instance.status.role == "prefill"}
        for address in set(self._channels) - wanted:
            self._spawn(self._channels.pop(address).close(None))
        self.changed.set()
        self.on_room()

    async def close(self) -> None:
        """Break every link; requests on them fail."""
        self._closed = True
        self._outliers.close()
        await self.news.close()
        if self._peers is not None:
            await self._peers.close()
        links, self._links = list(self._links.values()), {}
        await asyncio.gather(*(link.close() for link in links))
        for task in list(self._background):
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        channels, self._channels = list(self._channels.values()), {}
        await asyncio.gather(*(channel.close(None) for channel in channels))

    async def stream(self, live: LiveRequest) -> AsyncGenerator[RequestOutput, None]:
        """Outputs of `live` until it ends; closing the generator cancels the work.

        Raises:
            UnavailableError: no worker is ready for a first attempt, nor about to be, or too many were lost.
            QuarantinedError: workers were lost as they began it.
            DeadlineError: `live.deadline_s` passed.
            InvalidRequestError: no worker's memory can hold the prompt.
            BatonError: the worker failed on this request.
        """
        if faults.active is not None:
            faults.strike("submit", tokens=live.request.prompt_token_ids)
        refuse_at_s = asyncio.get_running_loop().time() + _CONNECT_S
        try:
            while True:
                begun = len(live.emitted_ids)
                try:
                    async with contextlib.aclosing(self._attempt(live)) as outputs:
                        async for output in outputs:
                            if live.is_alone and len(live.emitted_ids) - begun >= PROVEN_TOKENS:
                                self._quarantine.proven(live.request.request_id)
                                live.is_alone = False
                            yield output
                    return
                except LinkBrokenError as error:
                    await self._broke(live, error, gained_tokens=len(live.emitted_ids) - begun)
                except UnavailableError:
                    is_late = asyncio.get_running_loop().time() >= refuse_at_s
                    if not live.attempt and (is_late or not self._is_connecting()):
                        raise
                    await self._pause(live, _LOOK_AGAIN_S, "a decode worker to be ready")
        finally:
            self._quarantine.leave(live.request.request_id)

    async def _broke(self, live: LiveRequest, error: LinkBrokenError, *, gained_tokens: int) -> None:
        """Pauses until the next attempt. Raises what ends the request instead."""
        name, lost = live.request.request_id, live.decode_instance or "its decode worker"
        pause_s = live.retries.broke(error, gained_tokens=gained_tokens, chance=random.random())
        _log.warning("attempt %d of %s after %d tokens: %s", live.attempt, name, len(live.emitted_ids), error.message)
        self._metrics.resumes.labels(phase="streaming" if live.emitted_ids else "begun").inc()
        await self._end_reading(live)
        live.attempt += 1
        annotate(attempt=live.attempt)
        if gained_tokens >= PROVEN_TOKENS:
            self._quarantine.proven(name)
        elif error.has_died:
            self._quarantine.lost(name, live.failed[live.decode_instance], is_silent=error.is_silent)
        live.is_alone = False
        if not self._quarantine.is_suspected(name):
            await self._pause(live, pause_s, f"another attempt, as {lost} was lost")
            return
        await self._pause(
            live, max(pause_s, _JUDGE_AFTER_S), f"news of {lost}, which was lost as it began this request"
        )
        verdict = self._quarantine.judge(name, lambda incarnation: self._is_alive(incarnation, live))
        self._quarantine.leave(name)
        if verdict is Verdict.GUILTY:
            raise QuarantinedError(
                f"workers were lost as they began this request, again and again, so it is not tried any more;"
                f" the last one: {error.message}"
            ) from error
        if verdict is Verdict.ALONE:
            while not self._quarantine.enter(name):
                await self._pause(live, _LOOK_AGAIN_S, "other requests that may have killed workers to be tried")
            live.is_alone = True

    @staticmethod
    async def _end_reading(live: LiveRequest) -> None:
        """Ends the prefill half of an attempt whose decode worker was lost; if that one is lost too, it says so first.

        A request that kills workers has killed both: counted as one, it would cost a third.
        """
        reading, live.reading = live.reading, None
        if reading is not None:
            try:
                await asyncio.wait({reading}, timeout=_BOTH_LOST_S)
            finally:
                reading.cancel()

    def _is_connecting(self) -> bool:
        """Whether a decode worker is there and only the stream to it is not, which may be a matter of moments."""
        return any(
            instance.status.role == "decode" and instance.status.state == "ready" and instance.listed
            for instance in self._table.all()
        )

    def _is_alive(self, incarnation: bytes, live: LiveRequest) -> bool:
        """Whether a worker can be talked to, or could since `live` broke there, however often it was lost again."""
        return any(
            instance.status.incarnation == incarnation
            and ((instance.connected and instance.listed) or instance.welcomes > live.welcomes.get(incarnation, 0))
            for instance in self._table.all()
        )

    async def _pause(self, live: LiveRequest, pause_s: float, awaited: str) -> None:
        live.phase = f"it was waiting for {awaited}"
        live.outputs = queue = TokenQueue()  # an abort comes here meanwhile
        if live.aborted is not None:
            raise live.aborted
        remaining_s = live.deadline_s - asyncio.get_running_loop().time()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(max(min(pause_s, remaining_s), 0.0)):
                item = await queue.get()
                assert isinstance(item, BatonError)
                raise item
        if remaining_s <= pause_s:
            raise self._deadline_passed(live)

    def _deadline_passed(self, live: LiveRequest) -> DeadlineError:
        interrupted = f" and {live.retries.attempts} interruptions" if live.retries.attempts else ""
        return DeadlineError(
            f"the request's deadline passed after {len(live.emitted_ids)} tokens{interrupted}, while {live.phase}"
        )

    async def _attempt(self, live: LiveRequest) -> AsyncGenerator[RequestOutput, None]:
        if live.aborted is not None:
            raise live.aborted
        chosen_s = asyncio.get_running_loop().time()
        began_s = live.journal.now_s()
        decision = self._choose(live)
        traceparent = live.journal.dispatched(began_s, live.attempt, decision.decode_id, decision.prefill_id)
        request = _remaining(live, traceparent)
        link = self._links[decision.decode_id]
        command = pb.DecodeCommand()
        command.submit.remote_prefill = decision.prefill_id is not None
        command.submit.handover_timeout_s = self._handover_timeout_s
        # Where it is sent from: a long prompt is not copied from message to message.
        message = request_to_proto(request, command.submit.request)
        try:
            queue = link.submit(command)
        except LinkBrokenError:
            live.journal.attempt_ended(live.attempt)
            raise
        live.decode_instance, live.prefill_instance = decision.decode_id, ""
        live.failed[decision.decode_id] = link.instance.status.incarnation  # should it break
        live.welcomes[link.instance.status.incarnation] = link.instance.welcomes
        key = (request.request_id, request.attempt)
        live.outputs = queue
        # A request by itself goes the long way, on which its tokens are counted one by one.
        queue.tap = None if live.is_alone else live.tap
        live.phase = f"{decision.prefill_id or decision.decode_id} read its prompt for {decision.decode_id}"
        if decision.prefill_id is None:
            live.phase = f"{decision.decode_id} had it in its queue or read its prompt"
        claim = _Claim(link.instance, decision.uncached_tokens if decision.prefill_id is None else 0)
        prefill = self._start_prefill(decision, message, link, live)
        self._outliers.attempt_began()
        over = has_begun = False
        try:
            while not over:
                output = await self._next(queue, live)
                over = output.finish_reason is not None
                if output.token_ids:
                    if not has_begun:
                        has_begun = True
                        if not live.emitted_ids:
                            self.on_room()
                        taken_s = asyncio.get_running_loop().time() - chosen_s
                        self._ledger.began(decision, live.prefill_instance, taken_s)
                    claim.prefill_done()
                    live.phase = f"{live.decode_instance} wrote its answer"
                    live.emitted_ids += output.token_ids
                _raise_failures(output, live)
                yield output
        except LinkBrokenError as error:
            if error.has_died:
                live.reading, prefill = prefill, None
            raise
        finally:
            link.forget(key)
            queue.tap = None  # it holds whoever holds this request
            claim.end()
            live.journal.attempt_ended(live.attempt)
            self.on_room()
            self._outliers.attempt_ended()
            if prefill is not None and not over:
                prefill.cancel()

    async def _next(self, queue: TokenQueue, live: LiveRequest) -> RequestOutput:
        if queue.empty():
            try:
                async with asyncio.timeout_at(live.deadline_s):
                    item = await queue.get()
            except TimeoutError:
                raise self._deadline_passed(live) from None
        else:
            item = await queue.get()
        if isinstance(item, BatonError):
            try:
                raise item
            finally:
                del item  # it holds this frame, which would hold it
        if isinstance(item, int):
            live.prefill_instance = live.prefill_instance or live.decode_instance
            return RequestOutput(request_id=live.request.request_id, attempt=live.attempt, token_ids=[item])
        if item.token_ids and not live.prefill_instance:
            live.prefill_instance = item.prefill_instance or live.decode_instance
            reader = self._table.get(live.prefill_instance)
            if reader is not None:
                reader.prompt_read(len(live.request.prompt_token_ids) + len(live.emitted_ids), item.cached_tokens)
        return output_from_proto(item)

    def _choose(self, live: LiveRequest) -> Decision:
        prompt = (*live.request.prompt_token_ids, *live.emitted_ids)
        now_s = asyncio.get_running_loop().time()
        instances = self._table.all()
        keys, prefix_blocks = self._prefix_blocks(prompt, live.request.cache_salt)
        views = self._table.views()
        facts = RequestFacts(
            prompt_tokens=len(prompt),
            request_id=live.request.request_id,
            max_tokens=live.request.sampling.max_tokens - len(live.emitted_ids),
            wants_prompt_logprobs=live.request.sampling.prompt_logprobs is not None and not live.emitted_ids,
            prefix_blocks=prefix_blocks,
            session_instances=live.session_instances,
            recent_tokens=self._recent_tokens(views, now_s),
            turn=self._num_choices,
            avoid={i.instance_id for i in instances if live.failed.get(i.instance_id) == i.status.incarnation}
            or _NOBODY,
            ejected={view.instance_id for view in views if self._outliers.is_out(view)} or _NOBODY,
        )
        decision = live.decision = choose(views, facts, self._policy, self.costs)
        self.decisions.record(live.request.request_id, live.attempt, decision, now_s)
        self._num_choices += 1
        self._ledger.chosen(decision)
        self._recent.add(decision.decode_id, facts.prompt_tokens - decision.cached_tokens, now_s)
        if decision.prefill_id is not None:
            self._recent.add(decision.prefill_id, decision.uncached_tokens, now_s)
        reader_id = decision.prefill_id or decision.decode_id
        for chosen in instances:
            if chosen.instance_id in (decision.decode_id, decision.prefill_id):
                self.news.index.predict(chosen.instance_id, keys[chosen.block_size], now_s)
                if self._peers is not None:
                    self._peers.note(
                        chosen.instance_id,
                        chosen.status.incarnation,
                        prefill_tokens=decision.uncached_tokens if chosen.instance_id == reader_id else 0,
                        keys=keys[chosen.block_size][facts.prefix_blocks[chosen.instance_id] :],
                    )
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %s", live.request.request_id, "; ".join(decision.reasons))
        return decision

    def _prefix_blocks(self, prompt: Sequence[int], cache_salt: str) -> tuple[dict[int, list[int]], dict[str, int]]:
        """A prompt's block keys by block size, and how many of its first blocks each worker probably holds."""
        now_s, instances = asyncio.get_running_loop().time(), self._table.all()
        keys = {
            size: block_keys(block_hashes(prompt, size, cache_salt))
            for size in {instance.block_size for instance in instances}
        }
        matched = {size: self.news.index.match(blocks, now_s) for size, blocks in keys.items()}
        return keys, {
            instance.instance_id: matched[instance.block_size].get(instance.instance_id, 0) for instance in instances
        }

    def _recent_tokens(self, views: Sequence[InstanceView], now_s: float) -> dict[str, float]:
        roles = ("decode", "prefill")
        ids = ([view.instance_id for view in views if view.role == role] for role in roles)
        return {name: tokens for each in ids for name, tokens in self._recent.tokens(each, now_s).items()}

    def _start_prefill(
        self, decision: Decision, message: pb.EngineRequest, link: DecodeLink, live: LiveRequest
    ) -> asyncio.Task[None] | None:
        if decision.prefill_id is None:
            return None
        remaining_s = live.deadline_s - asyncio.get_running_loop().time()
        timeout_s = max(min(self._handover_timeout_s, remaining_s), 0.001)
        return self._spawn(self._prefill(self._claim_prefill(decision), message, link, live, timeout_s, decision))

    def _claim_prefill(self, decision: Decision) -> tuple[Instance, _Claim]:
        assert decision.prefill_id is not None
        instance = self._table.get(decision.prefill_id)
        assert instance is not None
        return instance, _Claim(instance, decision.uncached_tokens)

    async def _prefill(
        self,
        claimed: tuple[Instance, _Claim],
        message: pb.EngineRequest,
        link: DecodeLink,
        live: LiveRequest,
        timeout_s: float,
        decision: Decision,
    ) -> None:
        """Has a prefill worker compute the prompt, and others where it fails; the decode worker is told of each."""
        key = (message.request_id, message.attempt)
        deadline_s = asyncio.get_running_loop().time() + timeout_s
        for handover in range(MAX_PREFILLS):
            instance, claim = claimed
            failure = await self._prefill_on(instance, message, link, deadline_s, handover, claim)
            if handover:
                self._metrics.prefill_retries.labels(outcome="failed" if failure else "attached").inc()
            if failure is None:
                return
            live.failed[instance.instance_id] = instance.status.incarnation
            if failure.has_died:
                incarnation = instance.status.incarnation
                self._quarantine.lost(message.request_id, incarnation, is_silent=failure.is_silent)
            is_suspected = self._quarantine.is_suspected(message.request_id)
            reason = f"prefill on {instance.instance_id} failed: {failure.reason}"
            other = None
            if is_suspected and link.is_live(key):
                # To be judged before the decode worker dies of it, too.
                assert live.outputs is not None
                live.outputs.put(LinkBrokenError(reason, has_died=False))
                return
            if failure.may_try_again and handover + 1 < MAX_PREFILLS and link.is_live(key):
                other = self._other_prefill(decision, live.failed)
                if other is None:
                    self._metrics.prefill_retries.labels(outcome="none").inc()
            if other is None:
                _log.warning("%s: %s", message.request_id, reason)
                link.prefill_failed(key, reason)
                return
            self.decisions.record(message.request_id, message.attempt, other, asyncio.get_running_loop().time())
            claimed = self._claim_prefill(other)
            live.phase = f"{other.prefill_id} read its prompt for {decision.decode_id}"
            _log.warning("%s: %s; trying %s", message.request_id, reason, other.prefill_id)
            link.prefill_failed(key, reason, handover + 1)

    async def _prefill_on(
        self,
        instance: Instance,
        message: pb.EngineRequest,
        link: DecodeLink,
        deadline_s: float,
        handover: int,
        claim: _Claim,
    ) -> _PrefillFailure | None:
        timeout_s = max(deadline_s - asyncio.get_running_loop().time(), 0.001)
        request = pb.PrefillRequest(
            request=message,
            decode_address=link.instance.status.address,
            decode_incarnation=link.instance.status.incarnation,
            decode_ranks=[
                pb.RankAddress(address=rank.address, incarnation=rank.incarnation)
                for rank in link.instance.status.ranks
            ],
            decode_layout=link.instance.status.layout,
            timeout_s=timeout_s,
            handover=handover,
        )
        channel = self._channels.get(instance.status.address)
        if channel is None:
            channel = open_watched_channel(instance.status.address, self._silence_s)
            self._channels[instance.status.address] = channel
        try:
            reply = await rpc.PrefillStub(channel).Prefill(request, timeout=timeout_s)
            self._ledger.handed_over(instance.instance_id, link.instance.instance_id, reply)
            if not instance.is_followed:
                instance.load = reply.load
            return None
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), error.details() or ""
            return _PrefillFailure(
                f"{code.name}: {details}",
                may_try_again=code not in _FINAL_CODES,
                has_died=code is grpc.StatusCode.UNAVAILABLE and not details.startswith(_NEVER_REACHED),
                is_silent=is_ping_lost(error),
            )
        except asyncio.CancelledError:
            if is_being_cancelled():
                raise
            # Not this task was cancelled but the call: its channel was closed, since the worker is listed no more.
            return _PrefillFailure("it is gone, or silent", may_try_again=True)
        finally:
            claim.end()
            self.on_room()

    def _other_prefill(self, decision: Decision, failed: dict[str, bytes]) -> Decision | None:
        """Who computes the prompt after those have failed; None: the decode worker had better do it itself."""
        decode = self._table.get(decision.decode_id)
        if decode is None:
            return None
        views = [
            instance.view()
            for instance in self._table.all()
            if instance is decode
            or (instance.status.role == "prefill" and failed.get(instance.instance_id) != instance.status.incarnation)
        ]
        facts = dataclasses.replace(decision.facts, avoid=frozenset())
        try:
            other = choose(views, facts, self._policy, self.costs)
        except BatonError:
            return None
        return other if other.prefill_id is not None else None

    def _abandon(self, instance_id: str, reason: str) -> None:
        link = self._links.get(instance_id)
        if link is not None and any(other.instance.connected for other in self._links.values() if other is not link):
            link.abandon(reason)

    def _peer_chose(self, choice: pb.PendingChoice) -> None:
        """Another router has sent a request: counted in until the worker's own report shows it."""
        instance = self._table.get(choice.instance_id)
        if instance is None or instance.status.incarnation != choice.incarnation:
            return
        loop = asyncio.get_running_loop()
        self.news.index.predict(choice.instance_id, choice.block_keys, loop.time())
        loop.call_later(choice.ttl_s, instance.others.add(prefill_tokens=choice.prefill_tokens))

    def _ask_for_snapshot(self, instance_id: str) -> None:
        link = self._links.get(instance_id)
        if link is not None:
            link.ask_for_snapshot()

    def _spawn(self, work: object) -> asyncio.Task[None]:
        task: asyncio.Task[None] = asyncio.ensure_future(work)  # type: ignore[call-overload]
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        return task

    def _link_changed(self) -> None:
        # Deferred: the caller is a link, which reconciling may close.
        asyncio.get_running_loop().call_soon(self.reconcile)


def _do_nothing() -> None:
    pass


def _remaining(live: LiveRequest, traceparent: str) -> EngineRequest:
    """What is left to do of a request."""
    request = dataclasses.replace(
        live.request, attempt=live.attempt, resumed_token_ids=tuple(live.emitted_ids), traceparent=traceparent
    )
    if live.emitted_ids and request.sampling.prompt_logprobs is not None:
        # They were told with the first token.
        request = dataclasses.replace(request, sampling=dataclasses.replace(request.sampling, prompt_logprobs=None))
    return request


def _raise_failures(output: RequestOutput, live: LiveRequest) -> None:
    if output.finish_reason is FinishReason.ERROR:
        raise BatonError(f"{live.decode_instance} could not serve the request: {output.error or 'no reason given'}")
    if output.finish_reason is FinishReason.ABORT:
        reason = output.error or "it is stopping"
        raise LinkBrokenError(f"{live.decode_instance} gave the request up: {reason}", has_died=False)
