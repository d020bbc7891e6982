"""The fair queue: shares hold, nobody starves, nothing is lost, each tenant's own stay in order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.admission.fair_queue import CREDIT_TOKENS, LEAD_TOKENS, FairQueue, Waiting

_ONE = {"all": (0, 1.0)}
_TWO = {"urgent": (0, 3.0), "patient": (10, 1.0)}


def _push(queue: FairQueue[int], item: int, tenant: str, **options: float) -> Waiting[int]:
    weight, cost = options.get("weight", 1.0), options.get("cost", 10.0)
    priority = int(options.get("priority", 0))
    return queue.push(item, class_name="all", tenant=tenant, weight=weight, cost=cost, priority=priority)


def test_a_tenant_that_floods_waits_behind_its_own() -> None:
    queue: FairQueue[int] = FairQueue(_ONE)
    for item in range(100):
        _push(queue, item, "flood")
    for item in range(3):
        _push(queue, 1000 + item, "calm")
    taken = [queue.take().item for _ in range(7)]
    assert [item for item in taken if item >= 1000] == [1000, 1001, 1002]


def test_a_tenants_own_go_by_priority_then_arrival() -> None:
    queue: FairQueue[int] = FairQueue(_ONE)
    for item, priority in enumerate((5, 0, 5, -1, 0)):
        _push(queue, item, "a", priority=priority)
    assert [queue.take().item for _ in range(5)] == [3, 1, 4, 0, 2]


def test_who_comes_back_has_saved_little_up() -> None:
    queue: FairQueue[int] = FairQueue(_ONE)
    cost = CREDIT_TOKENS / 8
    for item in range(200):
        _push(queue, item, "busy", cost=cost)
    for _ in range(100):
        queue.take()
    for item in range(100):
        _push(queue, 1000 + item, "back", cost=cost)
    taken = [queue.take().item >= 1000 for _ in range(40)]
    assert all(taken[:8])
    assert sum(taken[8:]) == pytest.approx(16, abs=1)


def test_who_may_have_no_more_is_passed_over_and_saves_nothing_up() -> None:
    queue: FairQueue[int] = FairQueue(_ONE)
    cost = CREDIT_TOKENS / 8
    for item in range(100):
        _push(queue, item, "held", cost=cost)
        _push(queue, 1000 + item, "calm", cost=cost)
    assert [queue.take({"held"}).item for _ in range(60)] == list(range(1000, 1060))
    assert queue.head({"held", "calm"}) is None
    # Its turn again: not all that it would have had meanwhile, but what one is ahead by who was away.
    taken = [queue.take().item < 1000 for _ in range(24)]
    assert all(taken[:8])
    assert sum(taken[8:]) == pytest.approx(8, abs=1)


def test_a_class_in_which_nobody_may_go_lets_the_others_go() -> None:
    queue: FairQueue[str] = FairQueue(_TWO)
    queue.push("first", class_name="urgent", tenant="held", weight=1.0, cost=1.0)
    queue.push("second", class_name="patient", tenant="calm", weight=1.0, cost=1.0)
    assert queue.take({"held"}).item == "second"
    assert queue.head({"held"}) is None
    assert queue.take().item == "first"


def test_what_a_request_took_in_the_end_counts() -> None:
    queue: FairQueue[int] = FairQueue(_ONE)
    for item in range(10):
        _push(queue, item, "long")
        _push(queue, 100 + item, "short")
    assert [queue.take().item for _ in range(2)] == [0, 100]
    queue.settle(class_name="all", tenant="long", tokens=40)
    assert [queue.take().item for _ in range(4)] == [101, 102, 103, 104]


def test_an_urgent_class_goes_first_and_leaves_the_other_its_share() -> None:
    queue: FairQueue[str] = FairQueue(_TWO)
    cost = LEAD_TOKENS / 8
    for _ in range(400):
        for name in _TWO:
            queue.push(name, class_name=name, tenant="t", weight=1.0, cost=cost)
    taken = [queue.take().item for _ in range(400)]
    assert taken[:9] == ["urgent"] * 9
    assert taken.count("patient") == pytest.approx(100, abs=10)


def test_a_rare_urgent_request_goes_at_once_whatever_the_weights() -> None:
    queue: FairQueue[str] = FairQueue({"urgent": (0, 1.0), "patient": (10, 100.0)})
    for _ in range(50):
        queue.push("patient", class_name="patient", tenant="t", weight=1.0, cost=100)
        queue.take()
        queue.push("patient", class_name="patient", tenant="t", weight=1.0, cost=100)
        queue.push("urgent", class_name="urgent", tenant="t", weight=1.0, cost=100)
        assert queue.take().item == "urgent"
        queue.take()


_WEIGHTS = st.sampled_from([0.5, 1.0, 2.0, 4.0])


@given(st.lists(st.tuples(_WEIGHTS, st.lists(st.integers(1, 50), min_size=20, max_size=60)), min_size=2, max_size=5))
def test_shares_hold_while_all_wait(tenants: list[tuple[float, list[int]]]) -> None:
    queue: FairQueue[int] = FairQueue(_ONE)
    for number, (weight, costs) in enumerate(tenants):
        for cost in costs:
            _push(queue, number, str(number), weight=weight, cost=cost)
    left = [len(costs) for _, costs in tenants]
    served = [0.0] * len(tenants)
    while all(left):
        entry = queue.take()
        left[entry.item] -= 1
        served[entry.item] += entry.cost / tenants[entry.item][0]
    # The classic bound: two flows that wait are never further apart than one request of each.
    largest = [max(costs) / weight for weight, costs in tenants]
    for one in range(len(tenants)):
        for other in range(len(tenants)):
            if one != other:
                assert abs(served[one] - served[other]) <= largest[one] + largest[other] + 1e-9


_STEPS = st.lists(
    st.tuples(
        st.sampled_from(["push", "push", "take", "remove", "settle"]),
        st.integers(0, 3),
        st.integers(1, 5000),
        st.sampled_from(["urgent", "patient"]),
    ),
    max_size=120,
)


@given(_STEPS)
def test_nothing_is_lost_and_counts_hold(steps: list[tuple[str, int, int, str]]) -> None:
    queue: FairQueue[int] = FairQueue(_TWO)
    waiting: list[Waiting[int]] = []
    for number, (kind, tenant, cost, name) in enumerate(steps):
        if kind == "push":
            waiting.append(queue.push(number, class_name=name, tenant=f"t{tenant}", weight=1.0 + tenant, cost=cost))
        elif kind == "take" and queue:
            head = queue.head()
            assert queue.take() is head
            waiting.remove(head)  # type: ignore[arg-type]
        elif kind == "remove" and waiting:
            entry = waiting.pop(cost % len(waiting))
            queue.remove(entry)
            queue.remove(entry)
        elif kind == "settle":
            queue.settle(class_name=name, tenant=f"t{tenant}", tokens=cost - 2500.0)
        assert len(queue) == len(waiting) == len(list(queue))
        assert bool(queue) is bool(waiting)
        assert queue.cost == pytest.approx(sum(entry.cost for entry in waiting))
        for each in range(4):
            assert queue.num_of_tenant(f"t{each}") == sum(entry.tenant == f"t{each}" for entry in waiting)
        for each_class in _TWO:
            assert queue.num_in_class(each_class) == sum(entry.class_name == each_class for entry in waiting)
    taken = [queue.take() for _ in range(len(queue))]
    assert {entry.item for entry in taken} == {entry.item for entry in waiting}
    for tenant in range(4):
        for name in _TWO:
            own = [entry.item for entry in taken if (entry.tenant, entry.class_name) == (f"t{tenant}", name)]
            assert own == sorted(own)


@given(st.integers(1, 200), st.integers(1, 2000), _WEIGHTS)
def test_no_class_and_no_tenant_starves(flood: int, cost: int, weight: float) -> None:
    queue: FairQueue[str] = FairQueue(_TWO)
    queue.push("calm", class_name="patient", tenant="calm", weight=weight, cost=cost)
    queue.push("flood", class_name="patient", tenant="flood", weight=1.0, cost=1000)
    served = 0.0
    for _ in range(flood * 10 + 1000):
        queue.push("urgent", class_name="urgent", tenant="u", weight=1.0, cost=1000)
        queue.push("flood", class_name="patient", tenant="flood", weight=1.0, cost=1000)
        entry = queue.take()
        if entry.item == "calm":
            break
        served += entry.cost
    # The head start of the urgent class, its share of what the other one had, and a request each.
    assert served <= LEAD_TOKENS + 4 * (1000 + cost) + 3000


@given(
    st.lists(st.tuples(st.integers(0, 3), st.integers(1, 3000), st.sampled_from(["urgent", "patient"])), max_size=60),
    st.integers(0, 30),
    st.integers(0, 3),
    st.sampled_from(["urgent", "patient"]),
)
def test_the_work_ahead_is_what_is_taken_before(
    pushed: list[tuple[int, int, str]], num_taken: int, tenant: int, name: str
) -> None:
    queue: FairQueue[int] = FairQueue(_TWO)
    for number, (who, cost, class_name) in enumerate(pushed):
        queue.push(number, class_name=class_name, tenant=f"t{who}", weight=1.0 + who, cost=cost)
    for _ in range(min(num_taken, len(queue) - 1)):
        queue.take()
    thought = queue.work_ahead(class_name=name, tenant=f"t{tenant}", weight=1.0 + tenant)
    mine = queue.push(-1, class_name=name, tenant=f"t{tenant}", weight=1.0 + tenant, cost=1)
    ahead = 0.0
    while (entry := queue.take()) is not mine:
        ahead += entry.cost
    # An estimate: exact but for the requests that are about to go on either level.
    largest = max((cost for _, cost, _ in pushed), default=0)
    assert abs(ahead - thought) <= 10 * largest + 1
