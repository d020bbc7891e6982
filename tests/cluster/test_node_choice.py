"""Where stages go: a stage on one node, stages apart, instances spread."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.launchers.node_choice import Node, choose_nodes, nodes_text

BUNDLE = {"CPU": 1.0}


def node(name: str, cpus: float, num_ranks: int = 0) -> Node:
    return Node(name, f"10.0.0.{name}", {"CPU": cpus}, num_ranks)


def ids(chosen: tuple[Node, ...] | None) -> list[str] | None:
    return None if chosen is None else [node.node_id for node in chosen]


def test_one_node_takes_everything() -> None:
    assert ids(choose_nodes([node("1", 4)], num_stages=2, ranks_per_stage=2, bundle=BUNDLE)) == ["1", "1"]


def test_stages_are_apart_where_several_nodes_have_room() -> None:
    nodes = [node("1", 8), node("2", 8)]
    assert ids(choose_nodes(nodes, num_stages=2, ranks_per_stage=2, bundle=BUNDLE)) == ["1", "2"]
    nodes = [node("1", 8), node("2", 1)]
    assert ids(choose_nodes(nodes, num_stages=2, ranks_per_stage=2, bundle=BUNDLE)) == ["1", "1"]


def test_instances_go_where_the_fewest_ranks_are() -> None:
    nodes = [node("1", 8, num_ranks=3), node("2", 8, num_ranks=1), node("3", 8, num_ranks=2)]
    assert ids(choose_nodes(nodes, num_stages=2, ranks_per_stage=1, bundle=BUNDLE)) == ["2", "3"]


def test_a_stage_is_never_split() -> None:
    nodes = [node("1", 1.5), node("2", 1.5)]
    assert choose_nodes(nodes, num_stages=1, ranks_per_stage=2, bundle=BUNDLE) is None
    assert choose_nodes([], num_stages=1, ranks_per_stage=1, bundle=BUNDLE) is None


def test_shares_that_add_up_to_one_fit() -> None:
    third = {"GPU": 1 / 3}
    nodes = [Node("1", "a", {"GPU": 1.0})]
    assert ids(choose_nodes(nodes, num_stages=3, ranks_per_stage=1, bundle=third)) == ["1"] * 3
    assert choose_nodes(nodes, num_stages=4, ranks_per_stage=1, bundle=third) is None


def test_an_error_says_what_the_nodes_have() -> None:
    assert nodes_text([node("1", 1.5, 2)], ["CPU"]) == "10.0.0.1 (CPU 1.5 free, 2 ranks of this cluster)"
    assert nodes_text([], ["CPU"]) == "none"


@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=5),
    st.integers(1, 4),
    st.integers(1, 3),
)
def test_what_is_chosen_fits_and_is_spread_as_far_as_it_can_be(
    given_nodes: list[tuple[int, int]], num_stages: int, ranks_per_stage: int
) -> None:
    nodes = [node(str(index), cpus, ranks) for index, (cpus, ranks) in enumerate(given_nodes)]
    room = {each.node_id: int(each.free["CPU"]) // ranks_per_stage for each in nodes}
    chosen = ids(choose_nodes(nodes, num_stages=num_stages, ranks_per_stage=ranks_per_stage, bundle=BUNDLE))
    if chosen is None:
        assert sum(room.values()) < num_stages
        return
    counts = Counter(chosen)
    assert all(count <= room[node_id] for node_id, count in counts.items())
    assert len(counts) == min(num_stages, sum(amount > 0 for amount in room.values()))
