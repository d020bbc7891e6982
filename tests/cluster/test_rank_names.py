"""What a new controller makes of the names that Ray knows."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.launchers.rank_names import Shape, actor_name, group_name, sort_out

SHAPES = {"router": Shape(1, 0), "prefill": Shape(1, 1), "decode": Shape(4, 2)}


def names_of(instance_id: str, role: str, *, cluster: str = "c", run: str = "r1") -> tuple[list[str], list[str]]:
    shape = SHAPES[role]
    return (
        [actor_name(cluster, run, instance_id, rank) for rank in range(shape.num_ranks)],
        [group_name(cluster, run, instance_id, stage) for stage in range(shape.num_groups)],
    )


def test_whole_instances_are_kept_and_nothing_else() -> None:
    router, prefill, decode = (
        names_of("router-0", "router"),
        names_of("prefill-0", "prefill"),
        names_of("decode-0", "decode"),
    )
    actors, groups = [*router[0], *prefill[0], *decode[0]], [*prefill[1], *decode[1]]
    found = sort_out("c", "r1", actors, groups, SHAPES.__getitem__)
    assert found.whole == ["decode-0", "prefill-0", "router-0"]
    assert found.actors == found.groups == []


def test_an_instance_without_one_of_its_parts_is_not_whole() -> None:
    actors, groups = names_of("decode-0", "decode")
    for missing in actors:
        rest = [name for name in actors if name != missing]
        found = sort_out("c", "r1", rest, groups, SHAPES.__getitem__)
        assert (found.whole, found.actors, found.groups) == ([], sorted(rest), sorted(groups))
    found = sort_out("c", "r1", actors, groups[1:], SHAPES.__getitem__)
    assert (found.whole, found.actors, found.groups) == ([], sorted(actors), groups[1:])
    found = sort_out("c", "r1", [], groups, SHAPES.__getitem__)
    assert (found.whole, found.actors, found.groups) == ([], [], sorted(groups))


def test_an_instance_with_more_ranks_than_it_should_have_is_not_whole() -> None:
    actors = [actor_name("c", "r1", "router-0", rank) for rank in range(2)]
    assert sort_out("c", "r1", actors, [], SHAPES.__getitem__).whole == []


def test_other_runs_are_leftovers_and_other_clusters_no_concern() -> None:
    old, group = names_of("prefill-0", "prefill", run="r0")
    foreign, foreign_group = names_of("prefill-0", "prefill", cluster="c-2")
    found = sort_out("c", "r1", [*old, *foreign, "c-controller"], [*group, *foreign_group], SHAPES.__getitem__)
    assert (found.whole, found.actors, found.groups) == ([], old, group)


def test_without_a_run_everything_of_the_cluster_is_left_over() -> None:
    actors, groups = names_of("decode-0", "decode")
    found = sort_out("c", None, [*actors, "other/r1/decode-0/rank0"], groups, SHAPES.__getitem__)
    assert (found.whole, found.actors, found.groups) == ([], actors, groups)


@given(st.data())
def test_every_name_is_kept_or_ended(data: st.DataObject) -> None:
    every = [
        names_of(f"{role}-{index}", role, run=run) for role in SHAPES for index in range(3) for run in ("r0", "r1")
    ]
    actors = data.draw(st.sets(st.sampled_from([name for actors, _ in every for name in actors])))
    groups = data.draw(st.sets(st.sampled_from([name for _, groups in every for name in groups])))
    found = sort_out("c", "r1", actors, groups, SHAPES.__getitem__)
    kept = [names_of(instance_id, instance_id.split("-")[0]) for instance_id in found.whole]
    kept_actors, kept_groups = (
        {name for names, _ in kept for name in names},
        {name for _, names in kept for name in names},
    )
    assert kept_actors | set(found.actors) == actors
    assert kept_groups | set(found.groups) == groups
    assert not kept_actors & set(found.actors)
    assert not kept_groups & set(found.groups)
