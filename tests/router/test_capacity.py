"""Room at the workers: slots, memory at its peak, prompts that wait; and the lengths that are expected."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.admission.capacity import Capacity, Demand, Held, Room, peak_tokens
from baton.router.admission.output_lengths import OutputLengths
from baton.router.routing.facts import InstanceView

_SMALL = Demand(1, 100, 100)


def _view(name: str = "decode-0", **options: Any) -> InstanceView:
    return InstanceView(**{"instance_id": name, "role": name.partition("-")[0], **options})


def _room(views: list[InstanceView], held: list[Held] | None = None, demand: Demand = _SMALL, **options: int) -> Room:
    held = held or []
    capacity = Capacity(
        **{"default_slots": 4, "prefill_lookahead_tokens": 1000, "decode_lookahead_tokens": 500, **options}
    )
    return capacity.room(
        views,
        demand,
        on_their_way=[each for each in held if not each.instance_id],
        held_tokens=sum(each.used_tokens + each.remaining_tokens for each in held),
        held=lambda: held,
    )


def _simulated_peak(requests: list[tuple[int, int]]) -> int:
    """A token each, step by step; whoever is done frees what it has."""
    now, peak = [list(request) for request in requests], 0
    while now:
        peak = max(peak, sum(used for used, _ in now))
        for request in now:
            request[0] += 1
            request[1] -= 1
        peak = max(peak, sum(used for used, remaining in now if remaining >= 0))
        now = [request for request in now if request[1] > 0]
    return peak


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(1, 30)), max_size=12))
def test_the_peak_is_that_of_running_them(requests: list[tuple[int, int]]) -> None:
    assert peak_tokens(requests) == _simulated_peak(requests)


def test_no_worker_and_a_worker_that_reports_nothing() -> None:
    assert _room([]) is Room.NO_WORKER
    assert _room([_view(state="starting"), _view("decode-1", connected=False)]) is Room.NO_WORKER
    assert _room([_view(own_requests=3)]) is Room.OPEN
    assert _room([_view(own_requests=4)]) is Room.SLOTS
    assert _room([_view(own_requests=4, max_running_requests=5)]) is Room.OPEN


def test_slots_count_what_others_sent_and_what_is_on_its_way() -> None:
    views = [_view(running_requests=3, max_running_requests=4), _view("decode-1", max_running_requests=4)]
    on_its_way = Held("", 10, 10)
    assert _room(views, [on_its_way] * 4) is Room.OPEN
    assert _room(views, [on_its_way] * 5) is Room.SLOTS
    # Many answers need not find all their slots free, but nothing is put on top of a full house.
    assert _room(views, [on_its_way] * 3, Demand(128, 10, 10)) is Room.OPEN
    assert _room(views, [on_its_way] * 4, Demand(128, 10, 10)) is Room.SLOTS
    assert _room([_view(max_running_requests=4)], [], Demand(128, 10, 10)) is Room.OPEN


def test_prompts_wait_here_and_not_at_the_workers() -> None:
    decode = _view(max_running_requests=100)
    assert _room([decode, _view("prefill-0", own_prefill_tokens=1400, own_requests=5)]) is Room.OPEN
    assert _room([decode, _view("prefill-0", own_prefill_tokens=1600, own_requests=5)]) is Room.PROMPTS
    # However long: one is read, and the next one is there.
    assert _room([decode, _view("prefill-0", own_prefill_tokens=9000, own_requests=1)]) is Room.OPEN
    assert _room([decode, _view("prefill-0", own_prefill_tokens=9000, own_requests=2)]) is Room.PROMPTS
    assert _room([decode, _view("prefill-0")], [Held("", 9000, 10, 9000)] * 2) is Room.PROMPTS
    assert _room([_view(own_prefill_tokens=600, own_requests=2)]) is Room.PROMPTS


def _memory(blocks: int, held: list[Held], **options: Any) -> Room:
    view = _view(
        kv_blocks_total=blocks,
        kv_blocks_free=options.pop("free", 0),
        max_running_requests=100,
        own_requests=len(held),
        running_requests=len(held),
        **options,
    )
    return _room([view], held)


def test_memory_is_judged_at_its_peak() -> None:
    ends_soon = Held("decode-0", 900, 10)
    lasts = Held("decode-0", 200, 700)
    # 900 + 200 + 100 now, and never more than 1400 with what is to come, though all ends together are 2010.
    assert _memory(96, [ends_soon, lasts]) is Room.OPEN
    assert _memory(70, [ends_soon, lasts]) is Room.MEMORY
    # Two long ones that share their pages: what is free decides.
    twins = [Held("decode-0", 900, 50), Held("decode-0", 900, 50)]
    assert _memory(100, twins, free=10) is Room.MEMORY
    assert _memory(100, twins, free=40) is Room.OPEN


def test_another_routers_requests_count_as_reported() -> None:
    busy = _view(
        kv_blocks_total=100, max_running_requests=100, running_requests=4, context_tokens=800, max_remaining_tokens=700
    )
    assert _room([busy]) is Room.MEMORY
    assert _room([busy, _view("decode-1", kv_blocks_total=100, max_running_requests=100)]) is Room.OPEN


def test_a_request_too_large_for_any_worker_goes_when_alone() -> None:
    assert _room([_view(kv_blocks_total=4, max_running_requests=4)]) is Room.OPEN


def test_expected_lengths_follow_answers_and_preemptions() -> None:
    lengths = OutputLengths()
    assert lengths.expected("a", max_tokens=1000) == 1000
    for number in range(100):
        lengths.ended("a", written_tokens=100 + number % 10, max_tokens=1000)
    assert lengths.expected("a", max_tokens=1000) == pytest.approx(108, abs=2)
    assert lengths.expected("b", max_tokens=1000) == 1000
    lengths.preempted()
    raised = lengths.expected("a", max_tokens=1000)
    assert raised == pytest.approx(308, abs=2)
    for _ in range(200):
        lengths.ended("a", written_tokens=100, max_tokens=1000)
    assert lengths.expected("a", max_tokens=1000) < 120
    # One that outlives what was expected is expected to go on.
    assert 500 < lengths.expected("a", max_tokens=1000, written_tokens=500) <= 1000


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(1, 500)), max_size=40), st.integers(1, 1000))
def test_expected_lengths_are_possible_ones(ended: list[tuple[int, int]], most: int) -> None:
    lengths = OutputLengths()
    for written, limit in ended:
        lengths.ended("a", written_tokens=written, max_tokens=limit)
    for written in (0, 1, most // 2, most):
        assert written <= lengths.expected("a", max_tokens=most, written_tokens=written) <= most
