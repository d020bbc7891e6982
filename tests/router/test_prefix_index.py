"""The prefix index against a plain model of it."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from baton.engine.prefix_cache import block_hashes
from baton.router.prefix_index import PrefixIndex


def test_matches_leading_blocks_only() -> None:
    names = block_hashes(list(range(64)), 16)
    index = PrefixIndex()
    index.insert(names[:3], "a")
    index.insert(names[:1], "b")
    assert index.match(names) == {"a": 3, "b": 1}
    other = block_hashes([99, *range(1, 64)], 16)
    assert index.match(other) == {}
    assert index.match([]) == {}


def test_parents_outlive_children_and_forgotten_instances_are_gone() -> None:
    names = block_hashes(list(range(160)), 16)
    index = PrefixIndex(max_blocks=4)
    index.insert(names, "a")
    assert len(index) == 4
    assert index.match(names) == {"a": 4}
    index.insert(names[:2], "b")
    index.forget("a")
    assert index.match(names) == {"b": 2}
    index.forget("b")
    assert len(index) == 0


@given(st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=6), st.sampled_from("abc")), max_size=30))
def test_equals_a_plain_model_while_nothing_is_dropped(inserts: list[tuple[list[int], str]]) -> None:
    index = PrefixIndex()
    model: dict[str, set[tuple[int, ...]]] = {"a": set(), "b": set(), "c": set()}
    for tokens, instance in inserts:
        index.insert(block_hashes(tokens, 1), instance)
        model[instance] |= {tuple(tokens[:n]) for n in range(1, len(tokens) + 1)}
    for tokens, _ in inserts:
        expected = {
            name: depth
            for name, held in model.items()
            if (depth := sum(tuple(tokens[:n]) in held for n in range(1, len(tokens) + 1)))
        }
        assert index.match(block_hashes(tokens, 1)) == expected
