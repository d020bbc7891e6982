"""The step message: what goes in comes out, and nothing that is damaged gets near the pool."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.batch_buffers import BatchBuffers, SequenceRows
from baton.engine.step_message import (
    HEADER_BYTES,
    Message,
    MessageKind,
    StepBody,
    decode_header,
    decode_step,
)
from baton.engine.step_wire import batch_of, body_of
from baton.errors import UnavailableError

_BLOCKS, _VOCAB, _LEN = 64, 500, 96


@st.composite
def steps(draw: st.DrawFn) -> tuple[int, list[SequenceRows]]:
    block_size = draw(st.integers(1, 9))
    rows = []
    for _ in range(draw(st.integers(1, 5))):
        count = draw(st.integers(1, 12))
        start = draw(st.integers(0, _LEN - count))
        blocks = -(-(start + count) // block_size) + draw(st.integers(0, 1))
        rows.append(
            SequenceRows(
                draw(st.lists(st.integers(0, _VOCAB - 1), min_size=count, max_size=count)),
                start,
                draw(st.lists(st.integers(0, _BLOCKS - 1), min_size=blocks, max_size=blocks)),
                draw(st.sampled_from(["none", "last", "all"])),
            )
        )
    return block_size, rows


def decode(data: bytes, block_size: int) -> StepBody:
    return decode_step(data, num_blocks=_BLOCKS, vocab_size=_VOCAB, block_size=block_size)


@given(steps(), st.integers(1, 99))
def test_a_batch_comes_out_as_it_went_in(step: tuple[int, list[SequenceRows]], layers_per_group: int) -> None:
    block_size, rows = step
    cpu = torch.device("cpu")
    buffers = BatchBuffers(max_batch_tokens=60, max_batch_size=5, max_model_len=_LEN, block_size=block_size, device=cpu)
    batch = buffers.build(rows)
    body = decode(body_of(batch, block_size, layers_per_group).encode(), block_size)
    assert body.layers_per_group == layers_per_group
    again = batch_of(body, cpu)
    for name in ("token_ids", "positions", "slots", "query_start", "context_lens", "logit_rows"):
        before, after = getattr(batch, name), getattr(again, name)
        assert before.dtype == after.dtype, name
        assert torch.equal(before, after), name
    assert again.block_tables.dtype == batch.block_tables.dtype
    for index, row in enumerate(rows):
        used = -(-(row.start + len(row.token_ids)) // block_size)
        assert torch.equal(again.block_tables[index, :used], batch.block_tables[index, :used])
    assert body.tags.tolist() == [row.tag for row in rows]


def sample() -> StepBody:
    ints = lambda *values: np.array(values, dtype=np.int32)  # noqa: E731
    return StepBody(
        counts=ints(1, 3),
        context_lens=ints(9, 3),
        tags=ints(0, 41),
        blocks=ints(5, 6, 7, 8),
        token_ids=ints(1, 2, 3, 4),
        logit_rows=ints(0, 3),
        block_size=4,
        layers_per_group=2,
    )


@pytest.mark.parametrize(
    ("field", "values", "text"),
    [
        ("counts", (2, 3), "token counts"),
        ("counts", (0, 4), "token counts"),
        ("counts", (3, 1), None),
        ("context_lens", (0, 3), "token counts"),
        ("context_lens", (9, 5), "4 blocks do not cover"),
        ("blocks", (5, 6, 7, _BLOCKS), "a block id beyond the pool of 64"),
        ("blocks", (5, 6, 7, -1), "a block id beyond"),
        ("token_ids", (1, 2, 3, _VOCAB), "a token id beyond the vocabulary of 500"),
        ("token_ids", (1, -2, 3, 3), "a token id beyond"),
        ("tags", (7, 2**31 - 1), None),
        ("logit_rows", (3, 0), "logit rows"),
        ("logit_rows", (0, 4), "logit rows"),
        ("logit_rows", (-1, 3), "logit rows"),
    ],
)
def test_what_cannot_be_is_refused(field: str, values: tuple[int, ...], text: str | None) -> None:
    body = sample()
    fields = {name: getattr(body, name) for name in StepBody.__dataclass_fields__}
    data = StepBody(**{**fields, field: np.array(values, dtype=np.int32)}).encode()
    if text is None:
        assert getattr(decode(data, 4), field).tolist() == list(values)
    else:
        with pytest.raises(UnavailableError, match=text):
            decode(data, 4)


def test_another_block_size_is_refused() -> None:
    with pytest.raises(UnavailableError, match="block size 4, this rank has 8"):
        decode(sample().encode(), 8)


@given(st.binary(max_size=400))
def test_noise_is_refused_or_well_formed(data: bytes) -> None:
    for content in (data, sample().encode()[: len(data)], sample().encode()[:24] + data):
        try:
            body = decode(content, 4)
        except UnavailableError:
            continue
        assert bool((body.slots(body.block_table()) < _BLOCKS * 4).all())


@given(st.sampled_from(MessageKind), st.integers(0, 2**63), st.binary(max_size=50))
def test_headers(kind: MessageKind, step: int, body: bytes) -> None:
    encoded = Message(kind, step, body).encode()
    assert decode_header(encoded) == (kind, step, len(body))
    assert encoded[HEADER_BYTES:] == body


@pytest.mark.parametrize(
    ("position", "byte", "text"),
    [(0, 0, "expected b'BtnS'"), (4, 9, "version 9"), (6, 77, "kind 77"), (19, 255, "limit")],
)
def test_damaged_headers_are_refused(position: int, byte: int, text: str) -> None:
    encoded = bytearray(Message(MessageKind.TICK).encode())
    encoded[position] = byte
    with pytest.raises(UnavailableError, match=text):
        decode_header(bytes(encoded))
    with pytest.raises(UnavailableError, match="19 bytes, a header has 20"):
        decode_header(bytes(encoded[:19]))
