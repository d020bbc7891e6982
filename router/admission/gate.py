"""The door of a router: `admission.py` with a clock, futures for those that wait, and metrics.

    gate.check_rate(tenant, token_bounds)                       raises where a request of so many is refused for certain
    predicted_s = gate.check(spec, deadline_s)                  the same of this request, while others wait
    async with gate.admitted(spec, deadline_s) as ticket: ...   waits for its turn; raises where it does not come

The checks take nothing and promise nothing: they are there so that who is refused costs little, when there are many.

Whoever waits is woken when something ended, began to write, or was reported: `nudge`. Whoever leaves while it waits is
out of the queue at once.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from typing import NoReturn

from baton.config_admission import AdmissionConfig, SloConfig, TenantConfig
from baton.errors import BatonError
from baton.metrics import Metrics
from baton.router.admission.admission import Admission
from baton.router.admission.capacity import Capacity
from baton.router.admission.rate_limit import RateLimit
from baton.router.admission.tenants import OTHER, Tenant, Tenants
from baton.router.admission.ticket import Ask, PriorityClass, State, Ticket
from baton.router.admission.token_rates import TokenRates
from baton.router.routing.facts import InstanceView
from baton.router.token_bounds import TokenBounds
from baton.router.validation import GenerationSpec, Slo
from baton.state.base import SharedState

__all__ = ["Gate"]

_DEFAULT_BURST_S = 10.0
_POLL_EVERY_S = 0.002
"""At most: small models end steps faster, and each tells of its load."""


class Gate:
    """One per router.

    Args:
        views: the workers, as known now.
        predict_ttft_s: what the cost model says of a request that is dispatched now; None where it does not know.
        state: what token rates are shared over; None: this router counts alone.
        num_routers: that share them.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        *,
        max_requests: int,
        max_tokens: int,
        capacity: Capacity,
        views: Callable[[], Sequence[InstanceView]],
        metrics: Metrics,
        predict_ttft_s: Callable[[GenerationSpec], float | None] = lambda spec: None,
        state: SharedState | None = None,
        num_routers: int = 1,
    ) -> None:
        self._views = views
        self._metrics = metrics
        self._predict_ttft_s = predict_ttft_s
        known = {name: _tenant(name, each) for name, each in config.tenants.items()}
        known.setdefault("", _tenant("", config.default_tenant, max_queued_requests=max_requests))
        default = _tenant("", config.default_tenant)
        self._tenants = Tenants(known, default, max_tenants=config.max_tenants)
        self._rates = TokenRates(state, max_tenants=config.max_tenants, num_routers=num_routers)
        self._has_rates = default.limit is not None or any(each.limit is not None for each in known.values())
        self._admission = Admission(
            max_requests=max_requests,
            max_tokens=max_tokens,
            capacity=capacity,
            classes={
                name: PriorityClass(
                    name=name,
                    priority=each.priority,
                    weight=each.weight,
                    ttft_s=_slo(each.slo).ttft_s,
                    max_queued_requests=each.max_queued_requests,
                )
                for name, each in config.classes.items()
            },
            default_class=config.default_class,
            tenants=self._tenants,
            rejects_early=config.reject_early,
            slack=config.reject_slack,
            on_refused=lambda reason: metrics.admission_refusals.labels(reason=reason).inc(),
        )
        self._default_class = config.default_class
        self._slos = {name: _slo(each.slo) for name, each in config.classes.items()}
        self._max_tenants = config.max_tenants
        self._told: set[str] = set()
        """Tenants that metrics name."""
        self._queue_gauges = {
            name: metrics.admission_queue.labels(priority_class=name) for name in self._admission.class_names
        }
        self._waiting: dict[Ticket, asyncio.Future[None]] = {}
        self._due: asyncio.Handle | None = None
        self._polled_s = 0.0
        self._timer: asyncio.TimerHandle | None = None
        self._tell()

    @property
    def num_requests(self) -> int:
        """Choices accepted and not ended, waiting ones included."""
        return self._admission.num_requests

    @property
    def num_tokens(self) -> int:
        """Their prompt plus maximal output tokens."""
        return self._admission.num_tokens

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return self._admission.num_queued

    def slo_of(self, spec: GenerationSpec) -> Slo:
        """What a request is held to: what it says, and what its class does where it says nothing."""
        asked, of_class = spec.slo or Slo(), self._slos[spec.priority_class or self._default_class]
        return Slo(
            ttft_s=of_class.ttft_s if asked.ttft_s is None else asked.ttft_s,
            tpot_s=of_class.tpot_s if asked.tpot_s is None else asked.tpot_s,
        )

    def set_num_routers(self, num: int) -> None:
        """So many share the tenants' token rates."""
        self._rates.num_routers = num

    def engine_priority(self, spec: GenerationSpec) -> int:
        """What workers order by; raises `InvalidRequestError` where there is no such class."""
        return self._admission.rule_of(spec.priority_class).priority + spec.priority

    def check_rate(self, tenant_name: str, token_bounds: Callable[[], TokenBounds]) -> None:
        """Refuse a request whose tenant's rate has not even the least of what it may take.

        Args:
            token_bounds: asked only of a tenant that has a rate.

        Raises:
            OverloadedError: refused.
        """
        if not self._has_rates:
            return
        now_s = asyncio.get_running_loop().time()
        tenant = self._tenants.enter(tenant_name)
        self._tenants.leave(tenant.name)
        if tenant.limit is None:
            return
        tokens = token_bounds()
        if self._rates.missing_s(tenant, tokens.least, now_s) > 0:
            about = str(tokens.likely) if tokens.likely == tokens.least else f"about {tokens.likely}"
            self._refuse_rate(tenant, about, self._rates.missing_s(tenant, tokens.likely, now_s))

    def check(self, spec: GenerationSpec, deadline_s: float) -> float | None:
        """Refuse what would be refused now, where others wait; what is predicted, for `admitted`.

        Raises:
            OverloadedError, InvalidRequestError: as `admitted`.
        """
        if not self._admission.num_queued:
            return None
        ask = self._ask(spec, deadline_s, None)
        return self._admission.check(ask, self._views(), asyncio.get_running_loop().time())

    @contextlib.asynccontextmanager
    async def admitted(
        self,
        spec: GenerationSpec,
        deadline_s: float,
        on_queued: Callable[[Ticket], None] = lambda ticket: None,
        *,
        predicted_s: float | None = None,
    ) -> AsyncIterator[Ticket]:
        """Wait for the request's turn, and hold its place until the block ends.

        Args:
            on_queued: called with the ticket while it waits, so that `abort` may end that.
            predicted_s: what `check` has just said; None: to be predicted.

        Raises:
            OverloadedError: refused, at once or when it is certain that it would be too late.
            InvalidRequestError: there is no such class.
            DeadlineError, UnavailableError: its deadline passed while it waited.
        """
        loop = asyncio.get_running_loop()
        self._admission.rule_of(spec.priority_class)
        charge = await self._charge(spec) if self._has_rates else None
        written = 0
        try:
            ticket = self._admission.offer(self._ask(spec, deadline_s, predicted_s), self._views(), loop.time())
            try:
                if ticket.state is State.QUEUED:
                    on_queued(ticket)
                    await self._turn(ticket)
                has_finished = False
                try:
                    yield ticket
                    has_finished = True
                finally:
                    written = sum(len(work.emitted_ids) for work in ticket.works)
                    self._admission.release(ticket, loop.time(), has_finished=has_finished)
                    self._count(ticket, written)
                    self.nudge()
            finally:
                if ticket.state is State.QUEUED:
                    self._admission.leave(ticket, loop.time())
                    self._tell()
        finally:
            if charge is not None:
                prompts = sum(len(choice.prompt_token_ids) for choice in spec.choices) if written else 0
                self._rates.refund(charge, spec.num_tokens - prompts - written, loop.time())

    def abort(self, ticket: Ticket, error: BatonError) -> None:
        """If it waits, it waits no more."""
        future = self._waiting.get(ticket)
        if future is not None and not future.done():
            future.set_exception(error)

    def started(self, ticket: Ticket) -> None:
        """The first token of a request came."""
        self._admission.started(ticket, asyncio.get_running_loop().time())

    def nudge(self) -> None:
        """There may be room now. Cheap where nobody waits; many nudges of a moment are one."""
        if self._waiting and self._due is None:
            loop = asyncio.get_running_loop()
            due_s = self._polled_s + _POLL_EVERY_S
            self._due = loop.call_at(due_s, self._poll) if due_s > loop.time() else loop.call_soon(self._poll)

    async def close(self) -> None:
        """Nothing is let in or woken any more."""
        for handle in (self._timer, self._due):
            if handle is not None:
                handle.cancel()
        self._timer = self._due = None
        await self._rates.close()

    async def _charge(self, spec: GenerationSpec) -> Tenant:
        """Takes what the request may use at most from its tenant's rate; refuses it where that is not there."""
        now_s = asyncio.get_running_loop().time()
        tenant = self._tenants.enter(spec.tenant)
        self._tenants.leave(tenant.name)
        wait_s = await self._rates.take(tenant, spec.num_tokens, now_s)
        if wait_s > 0:
            self._refuse_rate(tenant, str(spec.num_tokens), wait_s)
        return tenant

    def _refuse_rate(self, tenant: Tenant, tokens: str, wait_s: float) -> NoReturn:
        assert tenant.limit is not None
        self._admission.refuse(
            "rate",
            f"tenant {tenant.name or 'of no name'} has used its {tenant.limit.tokens_per_s:g} tokens per second"
            f" (this request may take {tokens})",
            wait_s,
        )

    def _count(self, ticket: Ticket, written_tokens: int) -> None:
        if not written_tokens:
            return
        name = ticket.account.name
        if name not in self._told:
            # Names may come and go without end, and a metric forgets none.
            if len(self._told) < self._max_tenants:
                self._told.add(name)
            else:
                name = OTHER
        tokens = written_tokens + sum(prompt for prompt, _ in ticket.ask.choices)
        self._metrics.tenant_tokens.labels(tenant=name).inc(tokens)

    def _ask(self, spec: GenerationSpec, deadline_s: float, predicted_s: float | None) -> Ask:
        return Ask(
            choices=tuple((len(choice.prompt_token_ids), choice.sampling.max_tokens) for choice in spec.choices),
            deadline_s=deadline_s,
            class_name=spec.priority_class,
            tenant=spec.tenant,
            priority=spec.priority,
            ttft_s=spec.slo.ttft_s if spec.slo is not None else None,
            predict_s=lambda: self._predict_ttft_s(spec) if predicted_s is None else predicted_s,
        )

    async def _turn(self, ticket: Ticket) -> None:
        future = asyncio.get_running_loop().create_future()
        self._waiting[ticket] = future
        self.nudge()  # others may wait for what this one need not
        self._set_timer()
        self._tell()
        try:
            await future
        except asyncio.CancelledError:
            if ticket.state is State.GRANTED:  # its turn came in the moment in which it left
                self._admission.release(ticket, asyncio.get_running_loop().time(), has_finished=False)
                self.nudge()
            raise
        finally:
            self._waiting.pop(ticket, None)

    def _poll(self) -> None:
        if self._due is not None:
            self._due.cancel()
            self._due = None
        now_s = self._polled_s = asyncio.get_running_loop().time()
        views = self._views()
        for ticket in self._admission.poll(views, now_s):
            self._wake(ticket, None)
        has_worker = any(view.role == "decode" and view.usable for view in views)
        for ticket, error in self._admission.expire(now_s, has_worker=has_worker):
            self._wake(ticket, error)
        self._set_timer()
        self._tell()

    def _wake(self, ticket: Ticket, error: BatonError | None) -> None:
        future = self._waiting.pop(ticket)
        if future.done():
            # It was aborted or cancelled a moment ago, and finds out next.
            if ticket.state is State.GRANTED:
                self._admission.release(ticket, asyncio.get_running_loop().time(), has_finished=False)
                self.nudge()
        elif error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    def _set_timer(self) -> None:
        due_s = self._admission.next_expiry_s
        if self._timer is not None:
            if due_s is not None and self._timer.when() == due_s:
                return
            self._timer.cancel()
            self._timer = None
        if due_s is not None:
            self._timer = asyncio.get_running_loop().call_at(due_s, self._poll_at_expiry)

    def _poll_at_expiry(self) -> None:
        self._timer = None
        self._poll()

    def _tell(self) -> None:
        admission = self._admission
        for name, gauge in self._queue_gauges.items():
            gauge.set(admission.num_queued_in(name))
        self._metrics.admission_queue_tokens.set(admission.queued_tokens)
        self._metrics.requests_waiting.set(admission.num_queued)


def _tenant(name: str, config: TenantConfig, *, max_queued_requests: int | None = None) -> Tenant:
    limit = None
    if config.tokens_per_s is not None:
        burst = config.burst_tokens or config.tokens_per_s * _DEFAULT_BURST_S
        limit = RateLimit(tokens_per_s=config.tokens_per_s, burst_tokens=burst)
    return Tenant(
        name=name,
        weight=config.weight,
        limit=limit,
        max_queued_requests=max_queued_requests or config.max_queued_requests,
    )


def _slo(config: SloConfig) -> Slo:
    return Slo(
        ttft_s=None if config.ttft_ms is None else config.ttft_ms / 1000,
        tpot_s=None if config.tpot_ms is None else config.tpot_ms / 1000,
    )
