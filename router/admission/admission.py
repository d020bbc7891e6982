"""Who is let in, in which order, and who is refused: the pure machine behind `gate.py`.

    offer --bounds, early refusal--> refused (OverloadedError, with an honest hint when to come again)
      |---room, and nobody waits---> GRANTED --release--> ENDED
      `---------------------------> QUEUED --poll: next in the fair queue, and room--> GRANTED
                                       |-----leave: the client went--> ENDED
                                       `-----expire: too late, whatever happens--> ENDED

Where no decode worker is there, what comes goes straight on: the dispatcher knows whether one is about to be. What
waited already goes on waiting for one.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import NoReturn

from baton.errors import BatonError, DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from baton.router.admission.capacity import Capacity, Demand, Held, Room
from baton.router.admission.early_refusal import EarlyRefusal, Limit, Verdict
from baton.router.admission.fair_queue import FairQueue
from baton.router.admission.output_lengths import OutputLengths
from baton.router.admission.pace import Pace
from baton.router.admission.slot_shares import SlotShares, Standing
from baton.router.admission.tenants import Tenant, Tenants
from baton.router.admission.ticket import Ask, PriorityClass, State, Ticket
from baton.router.routing.facts import InstanceView

__all__ = ["Admission"]

_PACE_SAMPLES = 64
_COMPACT_ABOVE = 64
_MIN_RETRY_S = 1.0
_MAX_RETRY_S = 60.0


class Admission:
    """Decides; `gate.py` tells it what happens, and when.

    Args:
        max_requests: choices accepted and not ended.
        max_tokens: their prompt plus maximal output tokens. A single request larger than this is let in when alone.
        rejects_early: refuse what would be too late, instead of letting it try.
        on_refused: called with the reason of every refusal.

    Attributes:
        num_requests, num_tokens: accepted and not ended.
    """

    def __init__(
        self,
        *,
        max_requests: int,
        max_tokens: int,
        capacity: Capacity,
        classes: Mapping[str, PriorityClass],
        default_class: str,
        tenants: Tenants,
        rejects_early: bool = True,
        slack: float = 1.0,
        on_refused: Callable[[str], None] = lambda reason: None,
    ) -> None:
        assert max_requests > 0, max_requests
        assert max_tokens > 0, max_tokens
        assert default_class in classes, default_class
        self._max_requests = max_requests
        self._max_tokens = max_tokens
        self._capacity = capacity
        self._classes = dict(classes)
        self._default_class = default_class
        self._tenants = tenants
        self._rejects_early = rejects_early
        self._on_refused = on_refused
        self._refusal = EarlyRefusal(slack=slack)
        self._lengths = OutputLengths()
        self._pace = Pace()
        self._queue: FairQueue[Ticket] = FairQueue({n: (c.priority, c.weight) for n, c in classes.items()})
        self._expiries: list[tuple[float, int, str, Ticket]] = []
        self._numbers = itertools.count()
        self._lost: list[tuple[str, Ticket]] = []
        self._shares = SlotShares()
        self._granted: set[Ticket] = set()
        self._on_their_way: set[Ticket] = set()
        self._preemptions: dict[str, int] = {}
        self._ended: deque[tuple[float, int, int]] = deque(maxlen=_PACE_SAMPLES)
        self._held_tokens = 0
        self.num_requests = 0
        self.num_tokens = 0

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        return len(self._queue)

    @property
    def queued_tokens(self) -> float:
        """Tokens of work that wait."""
        return self._queue.cost

    def num_queued_in(self, class_name: str) -> int:
        """Requests of a class that wait."""
        return self._queue.num_in_class(class_name)

    @property
    def class_names(self) -> tuple[str, ...]:
        """All classes."""
        return tuple(self._classes)

    @property
    def next_expiry_s(self) -> float | None:
        """When `expire` is to be called at the latest."""
        while self._expiries and self._expiries[0][-1].state is not State.QUEUED:
            heapq.heappop(self._expiries)
        return self._expiries[0][0] if self._expiries else None

    def offer(self, ask: Ask, views: Sequence[InstanceView], now_s: float) -> Ticket:
        """Accept a request: at once, or into the queue.

        Raises:
            InvalidRequestError: there is no such class.
            OverloadedError: it cannot be accepted; carries `retry_after_s`.
        """
        rule = self.rule_of(ask.class_name)
        account = self._tenants.enter(ask.tenant)
        try:
            ticket, goes = self._weigh(ask, rule, account, views, now_s)
        except BaseException:
            self._tenants.leave(account.name)
            raise
        self.num_requests += len(ask.choices)
        self.num_tokens += ask.num_tokens
        if goes:
            self._grant(ticket, now_s)
        else:
            self._enqueue(ticket, now_s)
        return ticket

    def check(self, ask: Ask, views: Sequence[InstanceView], now_s: float) -> float | None:
        """Raises what `offer` would now, without accepting anything; what was predicted, for the offer that follows."""
        rule = self.rule_of(ask.class_name)
        account = self._tenants.enter(ask.tenant)
        try:
            ticket, _ = self._weigh(ask, rule, account, views, now_s)
        finally:
            self._tenants.leave(account.name)
        return ticket.predicted_s

    def poll(self, views: Sequence[InstanceView], now_s: float) -> list[Ticket]:
        """Whoever may go now, in order; `expire` tells of those whose turn came too late."""
        self._note_preemptions(views)
        granted: list[Ticket] = []
        at_share: set[str] = set()
        while (entry := self._queue.head(at_share)) is not None:
            room = self._room(views, entry.item, now_s)
            if room is Room.SHARE:
                at_share.add(entry.tenant)
                continue
            if room is not Room.OPEN:
                break
            if self._rejects_early and (reason := self._misses(entry.item, now_s)):
                self.leave(entry.item, now_s)
                self._lost.append((reason, entry.item))
                continue
            self._queue.take(at_share)
            self._pace.granted(entry.cost, now_s, is_last=not self._queue)
            self._grant(entry.item, now_s)
            granted.append(entry.item)
        return granted

    def expire(self, now_s: float, *, has_worker: bool = True) -> list[tuple[Ticket, BatonError]]:
        """Whoever waits in vain, and what to tell them. They have ended."""
        while (due_s := self.next_expiry_s) is not None and due_s <= now_s:
            _, _, reason, ticket = heapq.heappop(self._expiries)
            self.leave(ticket, now_s)
            self._lost.append((reason, ticket))
        expired = [
            (ticket, self._too_late(ticket, reason, now_s, has_worker=has_worker)) for reason, ticket in self._lost
        ]
        self._lost.clear()
        return expired

    def leave(self, ticket: Ticket, now_s: float) -> None:
        """One that waits will not be served."""
        assert ticket.state is State.QUEUED, ticket.state
        assert ticket.waiting is not None
        self._queue.remove(ticket.waiting)
        if not self._queue:
            self._pace.left()
        self._end(ticket)

    def started(self, ticket: Ticket, now_s: float) -> None:
        """The first token of a request came."""
        ticket.has_begun = True
        self._shares.began(ticket.account, len(ticket.ask.choices))
        self._refusal.served(
            now_s - ticket.granted_s, ttft_s=now_s - ticket.arrival_s, predicted_s=ticket.predicted_ttft_s
        )

    def release(self, ticket: Ticket, now_s: float, *, has_finished: bool = True) -> None:
        """What was granted has ended; `has_finished`: by itself, so that its answers' lengths say something."""
        assert ticket.state is State.GRANTED, ticket.state
        self._granted.discard(ticket)
        self._shares.ended(ticket.account, len(ticket.ask.choices), has_begun=ticket.has_begun)
        self._on_their_way.discard(ticket)
        self._held_tokens -= ticket.ask.num_tokens
        written = [len(work.emitted_ids) for work in ticket.works]
        if has_finished:
            for (_, most), tokens in zip(ticket.ask.choices, written, strict=False):
                self._lengths.ended(ticket.rule.name, written_tokens=tokens, max_tokens=most)
        if ticket.waiting is not None:
            took = sum(prompt for prompt, _ in ticket.ask.choices) + sum(written)
            self._queue.settle(
                class_name=ticket.rule.name, tenant=ticket.account.name, tokens=float(took) - ticket.cost
            )
        self._end(ticket)
        self._ended.append((now_s, len(ticket.ask.choices), ticket.ask.num_tokens))

    def rule_of(self, class_name: str) -> PriorityClass:
        """The class that a request names; the default one where it names none.

        Raises:
            InvalidRequestError: there is no such class.
        """
        rule = self._classes.get(class_name or self._default_class)
        if rule is None:
            names = ", ".join(self._classes)
            raise InvalidRequestError(
                f"priority_class must be one of {names}, got {class_name[:80]!r}", param="priority_class"
            )
        return rule

    def refuse(self, reason: str, message: str, retry_s: float) -> NoReturn:
        """Raises the refusal, counted."""
        self._on_refused(reason)
        retry_s = min(max(retry_s, _MIN_RETRY_S), _MAX_RETRY_S)
        raise OverloadedError(f"{message}; retry after {retry_s:.0f} s", retry_after_s=retry_s)

    def _weigh(
        self, ask: Ask, rule: PriorityClass, account: Tenant, views: Sequence[InstanceView], now_s: float
    ) -> tuple[Ticket, bool]:
        """What it would be given, and whether it goes at once; raises where it is refused."""
        self._check_totals(ask, now_s)
        ticket = self._ticket(ask, rule, account, now_s)
        self._note_preemptions(views)
        self._shares.came(account, now_s)
        room = self._room(views, ticket, now_s)
        goes = room is Room.NO_WORKER or (room is Room.OPEN and not self._queue)
        if not goes:
            self._check_queues(rule, account, now_s)
        if self._rejects_early and room is not Room.NO_WORKER:
            self._check_time(ticket, now_s, goes=goes)
        return ticket, goes

    def _ticket(self, ask: Ask, rule: PriorityClass, account: Tenant, now_s: float) -> Ticket:
        expected = max(self._lengths.expected(rule.name, max_tokens=most) for _, most in ask.choices)
        cost = sum(prompt + min(expected, most) for prompt, most in ask.choices)
        ttft_s = ask.ttft_s if ask.ttft_s is not None else rule.ttft_s
        return Ticket(
            ask=ask,
            rule=rule,
            account=account,
            cost=float(max(cost, 1)),
            expected=expected,
            arrival_s=now_s,
            predicted_s=ask.predict_s() if ttft_s is not None and self._rejects_early else None,
        )

    def _grant(self, ticket: Ticket, now_s: float) -> None:
        ticket.state = State.GRANTED
        ticket.granted_s = now_s
        self._granted.add(ticket)
        self._shares.granted(ticket.account, len(ticket.ask.choices))
        self._on_their_way.add(ticket)
        self._held_tokens += ticket.ask.num_tokens

    def _enqueue(self, ticket: Ticket, now_s: float) -> None:
        if not self._queue:
            self._pace.began_to_wait(now_s)
        ticket.waiting = self._queue.push(
            ticket,
            class_name=ticket.rule.name,
            tenant=ticket.account.name,
            weight=ticket.account.weight,
            cost=ticket.cost,
            priority=ticket.ask.priority,
        )
        due_s, reason = ticket.ask.deadline_s, "deadline"
        if self._rejects_early:
            due_s, reason = self._refusal.give_up_at_s(self._limit(ticket), arrival_s=ticket.arrival_s)
        heapq.heappush(self._expiries, (due_s, next(self._numbers), reason, ticket))
        if len(self._expiries) > _COMPACT_ABOVE + 2 * self.num_requests:
            self._expiries = [each for each in self._expiries if each[-1].state is State.QUEUED]
            heapq.heapify(self._expiries)

    def _end(self, ticket: Ticket) -> None:
        ticket.state = State.ENDED
        ticket.waiting = None  # which holds the ticket
        self._tenants.leave(ticket.account.name)
        self.num_requests -= len(ticket.ask.choices)
        self.num_tokens -= ticket.ask.num_tokens
        assert self.num_requests >= 0, "released more requests than admitted"
        assert self.num_tokens >= 0, "released more tokens than admitted"

    def _room(self, views: Sequence[InstanceView], ticket: Ticket, now_s: float) -> Room:
        for other in [each for each in self._on_their_way if _is_placed(each)]:
            self._on_their_way.discard(other)
        slots, readers = self._capacity.num_slots(views), self._capacity.num_readers(views)
        choices = len(ticket.ask.choices)
        ticket.is_beyond_share = False
        if slots:
            standing = self._shares.standing(ticket.account, choices, slots=slots, readers=readers, now_s=now_s)
            if standing is Standing.OVER:
                return Room.SHARE
            ticket.is_beyond_share = standing is Standing.BEYOND
        demand = Demand(len(ticket.ask.choices), max(prompt for prompt, _ in ticket.ask.choices), ticket.expected)
        return self._capacity.room(
            views,
            demand,
            on_their_way=self._held(self._on_their_way),
            held_tokens=self._held_tokens,
            held=lambda: self._held(self._granted),
            is_beyond_share=ticket.is_beyond_share,
        )

    def _held(self, tickets: set[Ticket]) -> list[Held]:
        held = []
        for ticket in tickets:
            works = ticket.works
            for index, (prompt, most) in enumerate(ticket.ask.choices):
                work = works[index] if index < len(works) else None
                written = len(work.emitted_ids) if work else 0
                total = self._lengths.expected(ticket.rule.name, max_tokens=most, written_tokens=written)
                held.append(
                    Held(
                        instance_id=work.decode_instance if work else "",
                        used_tokens=prompt + written,
                        remaining_tokens=total - written,
                        prompt_tokens_left=0 if written else prompt,
                    )
                )
        return held

    def _note_preemptions(self, views: Sequence[InstanceView]) -> None:
        for view in views:
            seen = self._preemptions.get(view.instance_id)
            if view.preemptions != seen:
                self._preemptions[view.instance_id] = view.preemptions
                if seen is not None and view.preemptions > seen:
                    self._lengths.preempted(view.preemptions - seen)

    def _limit(self, ticket: Ticket) -> Limit:
        ask = ticket.ask
        return Limit(ttft_s=ask.ttft_s if ask.ttft_s is not None else ticket.rule.ttft_s, deadline_s=ask.deadline_s)

    def _check_totals(self, ask: Ask, now_s: float) -> None:
        over_requests = self.num_requests + len(ask.choices) - self._max_requests
        over_tokens = self.num_tokens + ask.num_tokens - self._max_tokens
        if self.num_requests == 0 and len(ask.choices) <= self._max_requests:
            over_tokens = 0
        if over_requests > 0 or over_tokens > 0:
            self.refuse(
                "full",
                f"the server is full: {self.num_requests} requests with {self.num_tokens} tokens are in work"
                f" (router.max_queued_requests={self._max_requests}, router.max_queued_tokens={self._max_tokens})",
                self._until_ended_s(over_requests, over_tokens, now_s),
            )

    def _check_queues(self, rule: PriorityClass, account: Tenant, now_s: float) -> None:
        in_class, of_tenant = self._queue.num_in_class(rule.name), self._queue.num_of_tenant(account.name)
        mean = self._queue.cost / max(len(self._queue), 1)
        if in_class >= rule.max_queued_requests:
            self.refuse(
                "class_full",
                f"{in_class} requests of class {rule.name} wait already"
                f" (admission.classes.{rule.name}.max_queued_requests={rule.max_queued_requests})",
                self._pace.wait_s(mean * (in_class + 1 - rule.max_queued_requests), now_s) or 0.0,
            )
        if of_tenant >= account.max_queued_requests:
            self.refuse(
                "tenant_full",
                f"{of_tenant} requests of tenant {account.name or 'of no name'} wait already"
                f" (max_queued_requests={account.max_queued_requests})",
                self._pace.wait_s(mean * (of_tenant + 1 - account.max_queued_requests), now_s) or 0.0,
            )

    def _check_time(self, ticket: Ticket, now_s: float, *, goes: bool) -> None:
        verdict = self._judge(ticket, now_s, goes=goes)
        ticket.predicted_ttft_s = verdict.wait_s + verdict.service_s
        if verdict.reason:
            self.refuse(verdict.reason, self._missed(ticket, verdict), self._retry_s(verdict))

    def _misses(self, ticket: Ticket, now_s: float) -> str:
        return self._refusal.misses(
            self._limit(ticket), predicted_s=ticket.predicted_s, arrival_s=ticket.arrival_s, now_s=now_s
        )

    def _judge(self, ticket: Ticket, now_s: float, *, goes: bool) -> Verdict:
        ahead = 0.0
        if not goes:
            ahead = ticket.cost + self._queue.work_ahead(
                class_name=ticket.rule.name, tenant=ticket.account.name, weight=ticket.account.weight
            )
        return self._refusal.judge(
            self._limit(ticket), self._pace, ahead_tokens=ahead, predicted_s=ticket.predicted_s, now_s=now_s
        )

    def _missed(self, ticket: Ticket, verdict: Verdict) -> str:
        what = f"its first token is expected {verdict.ttft_s:.2f} s from now"
        if verdict.reason == "slo":
            return f"{what}, and it asks for {(self._limit(ticket).ttft_s or 0.0) * 1000:g} ms (slo.ttft_ms)"
        return f"{what}, and its deadline ends {ticket.ask.deadline_s - ticket.arrival_s:.2f} s after it came"

    @staticmethod
    def _retry_s(verdict: Verdict) -> float:
        # Where the queue alone is at fault, it is shorter by so much then; else nothing that is known will change.
        return verdict.late_s if verdict.late_s <= verdict.ttft_s - verdict.service_s else _MAX_RETRY_S

    def _too_late(self, ticket: Ticket, reason: str, now_s: float, *, has_worker: bool) -> BatonError:
        waited = f"it waited {now_s - ticket.arrival_s:.2f} s in the router's queue"
        if not has_worker:
            self._on_refused("no_worker")
            return UnavailableError(f"no decode worker became ready in time: {waited}; retry shortly")
        self._on_refused(f"queued_{reason}")
        if not self._rejects_early:
            return DeadlineError(f"the request's deadline passed while {waited}")
        bound = "slo.ttft_ms" if reason == "slo" else "its deadline"
        ahead = self._queue.work_ahead(
            class_name=ticket.rule.name, tenant=ticket.account.name, weight=ticket.account.weight
        )
        retry_s = min(max(self._pace.wait_s(ahead, now_s) or 0.0, _MIN_RETRY_S), _MAX_RETRY_S)
        return OverloadedError(
            f"{bound} cannot be met any more: {waited}; retry after {retry_s:.0f} s", retry_after_s=retry_s
        )

    def _until_ended_s(self, over_requests: int, over_tokens: int, now_s: float) -> float:
        if not self._ended:
            return _MIN_RETRY_S
        span_s = max(now_s - self._ended[0][0], 1e-3)
        ended_requests = sum(requests for _, requests, _ in self._ended)
        ended_tokens = sum(tokens for _, _, tokens in self._ended)
        return max(
            max(over_requests, 0) * span_s / max(ended_requests, 1), max(over_tokens, 0) * span_s / max(ended_tokens, 1)
        )


def _is_placed(ticket: Ticket) -> bool:
    return bool(ticket.works) and all(work.decode_instance for work in ticket.works)
