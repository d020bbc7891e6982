"""The plan covers every byte of the destination once, from a rank that holds it, for any two layouts."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.kv_layout import KvLayout
from baton.errors import IncompatibleError
from baton.kv_transfer.plan import (
    PageRange,
    Piece,
    block_spans,
    cell_bytes,
    driver_rank,
    head_range,
    layer_groups,
    layer_range,
    pair_pages,
    plan_transfer,
    rank_pages,
    split_range,
    taper_range,
    transfer_pairs,
)


def layout(layers: int = 4, heads: int = 4, tp: int = 1, pp: int = 1, block: int = 16) -> KvLayout:
    return KvLayout(
        num_layers=layers,
        num_kv_heads=heads,
        head_dim=8,
        block_size=block,
        dtype="bfloat16",
        tensor_parallel=tp,
        pipeline_parallel=pp,
    )


def holds(owner: KvLayout, rank: int, pages: PageRange) -> bool:
    stage, tensor_rank = divmod(rank, owner.tensor_parallel)
    layers, heads = layer_range(owner, stage), head_range(owner, tensor_rank)
    return layers[0] <= pages.layer_begin < pages.layer_end <= layers[1] and (
        heads[0] <= pages.head_begin < pages.head_end <= heads[1]
    )


@st.composite
def layout_pairs(draw: st.DrawFn) -> tuple[KvLayout, KvLayout]:
    layers, heads = draw(st.integers(1, 9)), draw(st.integers(1, 6))
    sides = [
        layout(layers, heads, draw(st.integers(1, 8)), draw(st.integers(1, 5)), draw(st.integers(1, 20)))
        for _ in range(2)
    ]
    if draw(st.booleans()) and sides[0].pipeline_parallel <= layers:
        cuts = draw(st.permutations(range(1, layers)).map(lambda p: sorted(p[: sides[0].pipeline_parallel - 1])))
        stages = tuple(end - begin for begin, end in itertools.pairwise([0, *cuts, layers]))
        sides[0] = replace(sides[0], layers_per_stage=stages)
    return (sides[0], sides[1]) if draw(st.booleans()) else (sides[1], sides[0])


@given(pair=layout_pairs(), begin=st.integers(0, 30), count=st.integers(0, 40))
def test_every_byte_is_sent_once_to_each_rank_that_holds_it(
    pair: tuple[KvLayout, KvLayout], begin: int, count: int
) -> None:
    source, destination = pair
    cells: Counter[tuple[int, int, int, int]] = Counter()
    for piece in plan_transfer(source, destination, begin, begin + count):
        assert holds(source, piece.source_rank, piece.pages)
        assert holds(destination, piece.destination_rank, piece.pages)
        pages = piece.pages
        cells.update(
            (piece.destination_rank, layer, head, token)
            for layer in range(pages.layer_begin, pages.layer_end)
            for head in range(pages.head_begin, pages.head_end)
            for token in range(pages.token_begin, pages.token_end)
        )
    expected = {
        (stage * destination.tensor_parallel + tensor_rank, layer, head, token)
        for stage in range(destination.pipeline_parallel)
        for tensor_rank in range(destination.tensor_parallel)
        for layer in range(*layer_range(destination, stage))
        for head in range(*head_range(destination, tensor_rank))
        for token in range(begin, begin + count)
    }
    assert set(cells) == expected
    assert set(cells.values()) <= {1}


@given(pair=layout_pairs(), begin=st.integers(0, 30), count=st.integers(0, 40))
def test_both_sides_of_a_pair_know_what_it_carries(pair: tuple[KvLayout, KvLayout], begin: int, count: int) -> None:
    source, destination = pair
    pieces = plan_transfer(source, destination, begin, begin + count)
    pairs = transfer_pairs(source, destination)
    assert {(piece.source_rank, piece.destination_rank) for piece in pieces} <= pairs
    for source_rank, destination_rank in pairs:
        boxes = pair_pages(source, source_rank, destination, destination_rank, begin, begin + count)
        assert list(boxes) == [
            p.pages for p in pieces if (p.source_rank, p.destination_rank) == (source_rank, destination_rank)
        ]
        held = rank_pages(source, source_rank, begin, begin + count)
        wanted = rank_pages(destination, destination_rank, begin, begin + count)
        assert all(box.within(held) and box.within(wanted) for box in boxes)
    assert sum(piece.pages.num_cells for piece in pieces) == sum(
        rank_pages(destination, rank, begin, begin + count).num_cells
        for rank in range(destination.tensor_parallel * destination.pipeline_parallel)
    )


@given(layers=st.integers(1, 12), heads=st.integers(1, 6), data=st.data())
def test_the_driver_always_ships_to_the_driver(layers: int, heads: int, data: st.DataObject) -> None:
    sides = [
        layout(layers, heads, data.draw(st.integers(1, 8)), data.draw(st.integers(1, layers)), 16) for _ in range(2)
    ]
    assert (driver_rank(sides[0]), driver_rank(sides[1])) in transfer_pairs(*sides)


@given(
    a=st.tuples(*[st.integers(0, 5)] * 3, *[st.integers(0, 4)] * 3),
    b=st.tuples(*[st.integers(0, 5)] * 3, *[st.integers(0, 4)] * 3),
)
def test_intersections(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    one, two = (PageRange(c[0], c[0] + c[3], c[1], c[1] + c[4], c[2], c[2] + c[5]) for c in (a, b))

    def cells(box: PageRange | None) -> set[tuple[int, int, int]]:
        ranges = () if box is None else (range(*box.layers), range(*box.heads), range(*box.tokens))
        return set(itertools.product(*ranges)) if ranges else set()

    assert cells(one.intersection(two)) == cells(one) & cells(two)
    assert one.shifted(3, 2).shifted(-3, -2) == one


def test_equal_layouts_send_rank_to_rank() -> None:
    both = layout(tp=2, pp=2)
    assert plan_transfer(both, both, 16, 40) == (
        Piece(0, 0, PageRange(0, 2, 0, 2, 16, 40)),
        Piece(1, 1, PageRange(0, 2, 2, 4, 16, 40)),
        Piece(2, 2, PageRange(2, 4, 0, 2, 16, 40)),
        Piece(3, 3, PageRange(2, 4, 2, 4, 16, 40)),
    )


def test_source_replicas_share_the_load() -> None:
    replicated, single = layout(heads=2, tp=8), layout(heads=2)
    sent = Counter[int]()
    for piece in plan_transfer(replicated, single, 0, 128):
        sent[piece.source_rank] += piece.pages.num_cells
    assert sent == dict.fromkeys(range(8), 4 * 32)
    from_all = plan_transfer(replicated, layout(heads=2, tp=8, block=4), 0, 128)
    assert {(piece.source_rank, piece.destination_rank) for piece in from_all} == {(r, r) for r in range(8)}


def test_cuts_between_replicas_meet_at_destination_blocks() -> None:
    pieces = plan_transfer(layout(heads=1, tp=3), layout(heads=1, block=16), 32, 100)
    assert [(p.pages.token_begin, p.pages.token_end) for p in pieces] == [(32, 48), (48, 64), (64, 100)]


def test_layouts_of_other_models_are_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"num_layers=4.*num_layers=5"):
        plan_transfer(layout(), layout(layers=5), 0, 1)


@given(
    box=st.tuples(*[st.integers(0, 5)] * 3, *[st.integers(1, 12)] * 3),
    cell=st.integers(1, 64),
    limit=st.integers(64, 4000),
)
def test_split_pieces_fit_and_tile(box: tuple[int, ...], cell: int, limit: int) -> None:
    layer, head, token, layers, heads, tokens = box
    pages = PageRange(layer, layer + layers, head, head + heads, token, token + tokens)
    for split in (split_range, taper_range):
        parts = split(pages, cell_num_bytes=cell, max_bytes=limit)
        assert all(part.within(pages) and part.num_cells * cell <= limit for part in parts)
        assert sum(part.num_cells for part in parts) == pages.num_cells
        assert not any(a.overlaps(b) for i, a in enumerate(parts) for b in parts[:i])


@pytest.mark.parametrize(
    ("num_tokens", "expected"),
    [(1, [1]), (20, [10, 10]), (21, [3, 7, 7, 4]), (100, [5, 10, 10, 10, 10, 10, 10, 10, 10, 10, 5])],
)
def test_the_first_and_the_last_piece_are_short(num_tokens: int, expected: list[int]) -> None:
    parts = taper_range(PageRange(0, 2, 0, 2, 7, 7 + num_tokens), cell_num_bytes=4, max_bytes=160)
    assert [part.token_end - part.token_begin for part in parts] == expected


def test_a_cell_beyond_the_limit_cannot_be_split() -> None:
    with pytest.raises(ValueError, match="65 bytes, more than the payload limit of 64"):
        split_range(PageRange(0, 1, 0, 1, 0, 1), cell_num_bytes=65, max_bytes=64)


@given(num_layers=st.integers(1, 100), num_tokens=st.integers(1, 5000), num_groups=st.integers(1, 9))
def test_layer_groups_tile_the_layers(num_layers: int, num_tokens: int, num_groups: int) -> None:
    groups = layer_groups(num_layers, num_tokens, single_message_tokens=256, num_groups=num_groups)
    assert [layer for group in groups for layer in range(*group)] == list(range(num_layers))
    assert len(groups) == (1 if num_tokens < 256 else min(num_groups, num_layers))


@given(block=st.integers(1, 40), begin=st.integers(0, 100), count=st.integers(0, 100))
def test_block_spans_tile_the_tokens(block: int, begin: int, count: int) -> None:
    tokens = []
    for span in block_spans(block, begin, begin + count):
        assert 0 <= span.slot_begin < span.slot_end <= block
        assert span.block_index * block + span.slot_begin == span.token_begin
        tokens += range(span.token_begin, span.token_begin + span.slot_end - span.slot_begin)
    assert tokens == list(range(begin, begin + count))


def test_cell_bytes_agree_with_the_layout() -> None:
    for dtype in ("float32", "bfloat16", "float16"):
        one = replace(layout(), dtype=dtype)
        assert cell_bytes(one) * one.num_layers * one.num_kv_heads == one.token_bytes
