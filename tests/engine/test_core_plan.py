"""Who gets which cores of a host."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.core_plan import Place, plan_cores

PREFILL, DECODE = Place(0), Place(1)


def test_one_worker_of_each_kind_takes_half_the_cores_and_the_first_what_is_left_over() -> None:
    assert plan_cores([DECODE, PREFILL], [0, 1], {}) == {PREFILL: (0,), DECODE: (1,)}
    assert plan_cores([DECODE, PREFILL], [0, 1, 2], {}) == {PREFILL: (0, 1), DECODE: (2,)}


def test_a_lone_worker_has_the_host_for_itself() -> None:
    assert plan_cores([DECODE], [3, 4, 9], {}) == {DECODE: (3, 4, 9)}


def test_more_workers_than_cores_share() -> None:
    places = [Place(0, 0, rank) for rank in range(2)] + [Place(1, 0, rank) for rank in range(3)]
    assert [plan_cores(places, [0, 1], {})[place] for place in places] == [(0,), (1,), (0,), (1,), (0,)]


def test_named_cores_go_to_their_group_and_the_rest_to_the_others() -> None:
    assert plan_cores([PREFILL, DECODE], range(8), {0: (0, 1, 2, 3, 4, 5)}) == {
        PREFILL: (0, 1, 2, 3, 4, 5),
        DECODE: (6, 7),
    }
    assert plan_cores([PREFILL, DECODE], [0, 1], {0: (0, 1)})[DECODE] == (0, 1), "nothing is left: all share"
    assert plan_cores([PREFILL], [4, 5], {0: (0, 1)}) == {PREFILL: (4, 5)}, "cores of another host"


places = st.builds(Place, st.integers(0, 1), st.integers(0, 40), st.integers(0, 7))
cores = st.sets(st.integers(0, 255), min_size=1, max_size=64)


@given(st.sets(places, min_size=1, max_size=64), cores, st.dictionaries(st.integers(0, 1), cores, max_size=2))
def test_everyone_gets_cores_of_this_host_and_nobody_more_than_a_fair_share(
    workers: set[Place], host: set[int], named: dict[int, set[int]]
) -> None:
    plan = plan_cores(workers, sorted(host), {group: sorted(cores) for group, cores in named.items()})
    assert set(plan) == workers
    assert all(own and set(own) <= host for own in plan.values())
    for group in (0, 1):
        sizes = [len(plan[place]) for place in workers if place.group == group]
        assert not sizes or max(sizes) - min(sizes) <= 1


@given(places)
def test_a_place_survives_packing(place: Place) -> None:
    assert Place.unpack(place.pack()) == place
