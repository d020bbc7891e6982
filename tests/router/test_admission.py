"""The machine of admission: bounds, order and refusals hold for any sequence, and hints are usable."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.errors import DeadlineError, InvalidRequestError, OverloadedError, UnavailableError
from baton.router.admission.admission import Admission
from baton.router.admission.capacity import Capacity
from baton.router.admission.tenants import OTHER, Tenant, Tenants
from baton.router.admission.ticket import Ask, PriorityClass, State, Ticket
from baton.router.routing.facts import InstanceView

_CLASSES = {
    "urgent": PriorityClass(name="urgent", weight=4.0, max_queued_requests=8),
    "patient": PriorityClass(name="patient", priority=10, ttft_s=30.0),
}
_FREE = (InstanceView(instance_id="decode-0", role="decode", max_running_requests=1000),)
_FULL = (InstanceView(instance_id="decode-0", role="decode", max_running_requests=4, running_requests=4),)


def _admission(**options: Any) -> Admission:
    default = Tenant(name="", max_queued_requests=options.pop("max_of_tenant", 1000))
    return Admission(
        **{
            "max_requests": 1000,
            "max_tokens": 1_000_000,
            "capacity": Capacity(
                default_slots=4, prefill_lookahead_tokens=10_000_000, decode_lookahead_tokens=10_000_000
            ),
            "classes": _CLASSES,
            "default_class": "urgent",
            "tenants": Tenants({"": Tenant(name="")}, default, max_tenants=options.pop("max_tenants", 100)),
            **options,
        }
    )


def _ask(prompt: int = 10, output: int = 10, *, choices: int = 1, **options: Any) -> Ask:
    return Ask(**{"choices": ((prompt, output),) * choices, "deadline_s": 1e6, **options})


def test_refuses_beyond_either_bound() -> None:
    admission = _admission(max_requests=2, max_tokens=100)
    admission.offer(_ask(50, 10), _FREE, 0)
    with pytest.raises(OverloadedError, match="max_queued_tokens=100"):
        admission.offer(_ask(40, 1), _FREE, 0)
    admission.offer(_ask(39, 1), _FREE, 0)
    with pytest.raises(OverloadedError, match="max_queued_requests=2"):
        admission.offer(_ask(1, 1), _FREE, 0)


def test_one_large_request_is_let_in_when_alone() -> None:
    admission = _admission(max_requests=2, max_tokens=100)
    large = admission.offer(_ask(990, 10), _FREE, 0)
    with pytest.raises(OverloadedError):
        admission.offer(_ask(1, 1), _FREE, 0)
    admission.release(large, 1)
    with pytest.raises(OverloadedError):
        admission.offer(_ask(1, 1, choices=3), _FREE, 1)


def test_the_hint_follows_the_pace_of_completions() -> None:
    admission = _admission(max_requests=10, max_tokens=10_000)
    for second in range(11):
        admission.release(admission.offer(_ask(1, 1), _FREE, 2 * second), 2 * second)
    admission.offer(_ask(1, 1, choices=10), _FREE, 20)
    with pytest.raises(OverloadedError) as caught:
        admission.offer(_ask(1, 1, choices=5), _FREE, 20)
    assert caught.value.retry_after_s == pytest.approx(5 * 20 / 11)


def test_waits_while_workers_are_full_and_goes_in_order() -> None:
    admission = _admission()
    first = admission.offer(_ask(class_name="patient"), _FULL, 0)
    second = admission.offer(_ask(), _FULL, 1)
    third = admission.offer(_ask(priority=-1), _FREE, 2)  # nobody passes those that wait, room or not
    assert {first.state, second.state, third.state} == {State.QUEUED}
    assert admission.poll(_FULL, 3) == []
    assert admission.poll(_FREE, 4) == [third, second, first]
    assert first.queue_s == 4
    assert second.queue_s == 3
    for ticket in (first, second, third):
        admission.release(ticket, 5)
    assert admission.num_requests == admission.num_tokens == admission.num_queued == 0


def test_a_tenant_at_its_share_holds_up_nobody_else() -> None:
    admission = _admission()
    views = (InstanceView(instance_id="decode-0", role="decode", max_running_requests=8),)
    floods = [admission.offer(_ask(tenant="flood"), views, 0) for _ in range(4)]
    calm = admission.offer(_ask(tenant="calm"), views, 0)
    assert {each.state for each in (*floods, calm)} == {State.GRANTED}
    for each in floods:
        admission.started(each, 0.5)
    # SLACK times half of eight slots is six: two more go, the others wait, and are first in the queue.
    for _ in range(4):
        floods.append(admission.offer(_ask(tenant="flood"), views, 1))
        if floods[-1].state is State.GRANTED:
            admission.started(floods[-1], 1)
    assert [each.state for each in floods[4:]] == [State.GRANTED, State.GRANTED, State.QUEUED, State.QUEUED]
    for _ in range(2000):  # whatever the calm one has had before
        admission.release(calm, 2)
        calm = admission.offer(_ask(tenant="calm"), views, 2)
        assert calm.state is State.QUEUED
        assert admission.poll(views, 2) == [calm]
    admission.release(floods[0], 3)
    assert admission.poll(views, 3) == [floods[6]]


def test_queues_of_classes_and_tenants_are_bounded() -> None:
    reasons: list[str] = []
    admission = _admission(max_of_tenant=3, on_refused=reasons.append)
    for _ in range(3):
        admission.offer(_ask(tenant="a"), _FULL, 0)
    with pytest.raises(OverloadedError, match="tenant a"):
        admission.offer(_ask(tenant="a"), _FULL, 0)
    with pytest.raises(OverloadedError, match="tenant a"):
        admission.offer(_ask(tenant="a", class_name="patient"), _FULL, 0)
    for number in range(5):
        admission.offer(_ask(tenant=f"b{number}"), _FULL, 0)
    with pytest.raises(OverloadedError, match=r"classes\.urgent\.max_queued_requests=8"):
        admission.offer(_ask(tenant="c"), _FULL, 0)
    admission.offer(_ask(tenant="c", class_name="patient"), _FULL, 0)
    assert reasons == ["tenant_full", "tenant_full", "class_full"]
    with pytest.raises(InvalidRequestError, match="one of urgent, patient, got 'urgnt'"):
        admission.offer(_ask(class_name="urgnt"), _FREE, 0)


def test_without_a_worker_new_ones_go_on_and_waiting_ones_wait() -> None:
    admission = _admission()
    waits = admission.offer(_ask(deadline_s=100), _FULL, 0)
    assert admission.offer(_ask(), (), 1).state is State.GRANTED
    assert admission.poll((), 2) == []
    assert waits.state is State.QUEUED
    (ended,) = admission.expire(100, has_worker=False)
    assert ended[0] is waits
    assert isinstance(ended[1], UnavailableError)


def _backlogged(admission: Admission, *, per_s: float = 10.0) -> float:
    """Lets it learn its pace, with one request of 20 tokens after another; returns the time."""
    now_s = 0.0
    for _ in range(20):
        ticket = admission.offer(_ask(), _FULL, now_s)
        now_s += 1 / per_s
        assert admission.poll(_FREE, now_s) == [ticket]
        admission.started(ticket, now_s + 0.05)
        admission.release(ticket, now_s)
    return now_s


def test_refuses_early_what_would_be_too_late() -> None:
    reasons: list[str] = []
    admission = _admission(on_refused=reasons.append)
    now_s = _backlogged(admission)
    for _ in range(5):
        admission.offer(_ask(), _FULL, now_s)
    # Six requests at ten a second, and 50 ms until the first token.
    assert admission.offer(_ask(ttft_s=0.7), _FULL, now_s).state is State.QUEUED
    with pytest.raises(OverloadedError, match=r"asks for 600 ms \(slo.ttft_ms\)") as caught:
        admission.offer(_ask(ttft_s=0.6), _FULL, now_s)
    assert caught.value.retry_after_s == 1
    with pytest.raises(OverloadedError, match="deadline"):
        admission.offer(_ask(deadline_s=now_s + 0.5), _FULL, now_s)
    assert reasons == ["slo", "deadline"]
    lax = _admission(rejects_early=False)
    now_s = _backlogged(lax)
    for _ in range(5):
        lax.offer(_ask(ttft_s=0.1), _FULL, now_s)


def test_the_cost_model_is_believed_and_corrected_within_bounds() -> None:
    admission = _admission()
    slow = _ask(ttft_s=1.0, predict_s=lambda: 3.0)
    with pytest.raises(OverloadedError) as caught:
        admission.offer(slow, _FREE, 0)
    assert caught.value.retry_after_s == 60  # waiting would change nothing
    for second in range(100):  # it says 0.9 s and takes 0.1
        ticket = admission.offer(_ask(ttft_s=1.0, predict_s=lambda: 0.9), _FREE, second)
        admission.started(ticket, second + 0.1)
        admission.release(ticket, second + 0.2)
    admission.offer(_ask(ttft_s=1.0, predict_s=lambda: 1.9), _FREE, 200)
    with pytest.raises(OverloadedError):
        admission.offer(slow, _FREE, 200)


def test_a_look_predicts_for_the_offer_that_follows() -> None:
    admission = _admission()
    now_s = _backlogged(admission)
    ask = _ask(ttft_s=100.0, predict_s=lambda: 0.25)
    before = admission.num_requests, admission.num_queued, admission.next_expiry_s
    assert admission.check(ask, _FULL, now_s) == 0.25
    assert (admission.num_requests, admission.num_queued, admission.next_expiry_s) == before
    with pytest.raises(OverloadedError, match=r"slo\.ttft_ms"):
        admission.check(_ask(ttft_s=0.01, predict_s=lambda: 0.25), _FULL, now_s)
    with pytest.raises(InvalidRequestError, match="priority_class"):
        admission.check(_ask(class_name="nobody"), _FULL, now_s)
    assert (admission.num_requests, admission.num_queued, admission.next_expiry_s) == before


def test_gives_up_what_waits_the_moment_it_is_too_late() -> None:
    admission = _admission()
    now_s = _backlogged(admission)
    waits = admission.offer(_ask(ttft_s=2.0), _FULL, now_s)
    due_s = admission.next_expiry_s
    assert due_s == pytest.approx(now_s + 2.0 - 0.05)
    assert admission.expire(due_s - 0.01) == []
    ((ticket, error),) = admission.expire(due_s)
    assert ticket is waits
    assert waits.state is State.ENDED
    assert isinstance(error, OverloadedError)
    assert admission.num_requests == 0
    lax = _admission(rejects_early=False)
    lax.offer(_ask(ttft_s=2.0, deadline_s=9.0), _FULL, 0)
    assert lax.expire(8.9) == []
    assert isinstance(lax.expire(9.0)[0][1], DeadlineError)


def test_whose_turn_comes_too_late_is_not_sent_on() -> None:
    admission = _admission()
    now_s = _backlogged(admission)
    for second in range(40):  # half of the first tokens take 0.4 s, some 0.05
        ticket = admission.offer(_ask(), _FREE, now_s)
        admission.started(ticket, now_s + (0.4 if second % 4 else 0.05))
        admission.release(ticket, now_s)
    late = admission.offer(_ask(ttft_s=1.0), _FULL, now_s)
    lasts = admission.offer(_ask(ttft_s=5.0), _FULL, now_s)
    assert late.state is lasts.state is State.QUEUED
    now_s += 0.8
    assert admission.expire(now_s) == []  # the fastest would still be in time
    assert admission.poll(_FREE, now_s) == [lasts]  # most would not
    ((ticket, error),) = admission.expire(now_s)
    assert ticket is late
    assert isinstance(error, OverloadedError)


def test_many_names_share_an_account_when_there_are_too_many() -> None:
    tenants = Tenants({"known": Tenant(name="known", weight=3)}, Tenant(name=""), max_tenants=3)
    assert [tenants.enter(name).name for name in ("a", "b", "c", "known", "a")] == ["a", "b", OTHER, "known", "a"]
    tenants.leave("b")
    assert tenants.enter("c").name == "c"
    assert tenants.enter("b").name == OTHER
    assert tenants.enter("known").weight == 3


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["offer", "offer", "offer", "poll", "leave", "release", "expire"]),
        st.integers(1, 5),
        st.integers(1, 60),
        st.sampled_from(["urgent", "patient"]),
        st.booleans(),
    ),
    max_size=80,
)


@given(_STEPS)
def test_counts_are_conserved(steps: list[tuple[str, int, int, str, bool]]) -> None:
    admission = _admission(max_requests=12, max_tokens=400, max_of_tenant=4)
    held: list[Ticket] = []
    hints_s: list[float] = []
    now_s = 0.0
    for kind, choices, tokens, class_name, is_free in steps:
        now_s += 1.0
        views = _FREE if is_free else _FULL
        queued = [ticket for ticket in held if ticket.state is State.QUEUED]
        running = [ticket for ticket in held if ticket.state is State.GRANTED]
        if kind == "offer":
            ask = _ask(
                tokens, 1, choices=choices, class_name=class_name, tenant=f"t{tokens % 3}", deadline_s=now_s + tokens
            )
            # A look first says what the offer then does, and changes nothing.
            told: list[tuple[str, float]] = []
            try:
                admission.check(ask, views, now_s)
            except OverloadedError as error:
                told.append((error.message, error.retry_after_s))
            try:
                held.append(admission.offer(ask, views, now_s))
            except OverloadedError as error:
                told.append((error.message, error.retry_after_s))
            assert told[:1] == told[1:]
            hints_s += [hint_s for _, hint_s in told]
        elif kind == "poll":
            assert all(ticket in queued for ticket in admission.poll(views, now_s))
        elif kind == "leave" and queued:
            admission.leave(queued[tokens % len(queued)], now_s)
        elif kind == "release" and running:
            admission.release(running[tokens % len(running)], now_s)
        elif kind == "expire":
            for ticket, _ in admission.expire(now_s):
                assert ticket.ask.deadline_s - now_s <= ticket.ask.deadline_s - ticket.arrival_s
            assert all(t.ask.deadline_s > now_s for t in held if t.state is State.QUEUED)
        held = [ticket for ticket in held if ticket.state is not State.ENDED]
        assert admission.num_requests == sum(len(ticket.ask.choices) for ticket in held) <= 12
        assert admission.num_tokens == sum(ticket.ask.num_tokens for ticket in held)
        assert admission.num_tokens <= 400 or len(held) == 1
        waiting = [ticket for ticket in held if ticket.state is State.QUEUED]
        assert admission.num_queued == len(waiting)
        assert sum(ticket.rule.name == "urgent" for ticket in waiting) <= 8
        for name in ("t0", "t1", "t2"):
            assert sum(ticket.account.name == name for ticket in waiting) <= 4
    assert all(1 <= hint_s <= 60 for hint_s in hints_s)
