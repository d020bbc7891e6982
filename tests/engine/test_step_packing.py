"""Packed steps: what lies where, and that the device's tables always say what the host's lists do."""

from __future__ import annotations

import random

import numpy as np
import numpy.typing as npt
import pytest
import torch

from baton.engine.batch_buffers import BatchBuffers, SequenceRows
from baton.engine.device_state import SAMPLING_WORDS, DeviceState
from baton.engine.sequence_slots import SequenceSlots
from baton.engine.step_packing import ALIGN_WORDS, ON_DEVICE, Field, StepPacker, TokenRows, aligned

_CPU = torch.device("cpu")
_SCRATCH = 99
_SAMPLING = bytes(range(8 * SAMPLING_WORDS))


def _packer(batch: int = 4, max_blocks: int = 6, block_size: int = 4) -> tuple[StepPacker, npt.NDArray[np.int32]]:
    packer = StepPacker(
        SequenceSlots(2 * batch),
        block_size=block_size,
        max_blocks=max_blocks,
        scratch_block=_SCRATCH,
        sampling_bytes=8 * SAMPLING_WORDS,
    )
    words = np.full(packer.capacity_words(max_batch_tokens=16, max_batch_size=batch), -7, dtype=np.int32)
    return packer, words


def _state(packer: StepPacker, words: npt.NDArray[np.int32], batch: int = 4, max_blocks: int = 6) -> DeviceState:
    return DeviceState(
        num_slots=2 * batch,
        max_blocks=max_blocks,
        block_size=4,
        scratch_block=_SCRATCH,
        num_words=len(words),
        max_rows=batch,
        device=_CPU,
    )


def _read(words: npt.NDArray[np.int32], field: Field) -> list[int]:
    assert field[0] % ALIGN_WORDS == 0
    return [int(word) for word in words[field[0] : field[0] + field[1]]]


def test_a_decode_step_and_its_padding() -> None:
    packer, words = _packer()
    first, second = [7, 3], [5]
    packed = packer.pack_decode(words, 4, [first, second], [5, 2], [11, ON_DEVICE], [_SAMPLING, _SAMPLING])
    stride = aligned(4)
    fields = words[: 5 * stride].reshape(5, stride)[:, :4].tolist()
    assert fields[0] == [0, 1, packer.scratch_slot, packer.scratch_slot]
    assert fields[1] == [5, 2, 0, 0]
    assert fields[2] == [11, ON_DEVICE, 0, 0]
    # Three new blocks fit the step's own fields.
    last_entry = 9 * 6 - 1
    assert fields[3] == [0, 1, 6, last_entry]
    assert fields[4] == [7, 3, 5, _SCRATCH]
    assert packed.entries[1] == packed.blocks[1] == 0
    assert _read(words, packed.new_slots) == [0, 1]
    assert np.array(_read(words, packed.samplings), dtype=np.int32).tobytes() == 2 * _SAMPLING
    assert packed.num_words <= len(words)

    first.append(8)
    packed = packer.pack_decode(words, 2, [second, first], [3, 8], [ON_DEVICE, ON_DEVICE], [_SAMPLING, _SAMPLING])
    fields = words[: 5 * aligned(2)].reshape(5, aligned(2))[:, :2].tolist()
    assert fields == [[1, 0], [3, 8], [-1, -1], [2, last_entry], [8, _SCRATCH]]
    assert packed.new_slots[1] == 0


def test_a_sequence_that_comes_with_many_blocks_brings_them_beside_the_fields() -> None:
    packer, words = _packer()
    packed = packer.pack_decode(words, 1, [[1, 2, 3]], [9], [4], [_SAMPLING])
    assert _read(words, packed.entries) == [1, 2]
    assert _read(words, packed.blocks) == [2, 3]


def test_any_step_becomes_the_batch_that_the_buffers_build() -> None:
    buffers = BatchBuffers(max_batch_tokens=16, max_batch_size=4, max_model_len=24, block_size=4, device=_CPU)
    packer, words = _packer()
    state = _state(packer, words)
    rows = [
        SequenceRows([21], 8, [3, 9, 8], "last"),
        SequenceRows([11, 12, 13], 6, [7, 2, 5, 10], "none"),
        SequenceRows([31, 32], 3, [1, 11], "last"),
    ]
    expected = buffers.build(rows)
    for known in (True, False):
        state.last_tokens.fill_(21)
        given = [
            TokenRows(row.block_ids, list(row.token_ids) if known or i else [], row.start, int(wants), _SAMPLING)  # type: ignore[arg-type]
            for i, (row, wants) in enumerate(zip(rows, (True, False, True), strict=True))
        ]
        packed = packer.pack(words, given, draws=True)
        state.words[: packed.num_words] = torch.from_numpy(words[: packed.num_words])
        state.update(packed)
        batch = state.batch(packed)
        for name in ("token_ids", "positions", "slots", "query_start", "context_lens", "logit_rows"):
            made, wanted = getattr(batch, name), getattr(expected, name)
            assert torch.equal(made, wanted), name
            assert made.dtype is wanted.dtype
            assert made.is_contiguous()
        assert batch.query_rows == (1, 3)
        for index, length in enumerate(expected.context_lens.tolist()):
            used = -(-length // 4)
            assert torch.equal(batch.block_tables[index, :used], expected.block_tables[index, :used])
        fields = packed.token_fields
        assert fields is not None
        assert _read(words, fields.drawn_slots) == [0, 2]
        assert _read(words, fields.drawn_positions) == [9, 5]


def test_nothing_is_drawn_where_the_host_does() -> None:
    packer, words = _packer()
    packed = packer.pack(words, [TokenRows([1], [4, 5], 0, 2, b"")], draws=False)
    assert packed.token_fields is not None
    assert packed.token_fields.drawn_slots[1] == 0
    assert _read(words, packed.token_fields.logit_rows) == [0, 1]


@pytest.mark.parametrize("seed", range(4))
def test_the_device_knows_every_block_of_every_row(seed: int) -> None:
    rng = random.Random(seed)
    packer, words = _packer()
    state = _state(packer, words)
    live: list[list[int]] = []
    for _ in range(200):
        live = [blocks for blocks in live if rng.random() < 0.9]
        while len(live) < 4 and rng.random() < 0.6:
            live.append([rng.randrange(90) for _ in range(rng.randrange(1, 6))])
        for blocks in live:
            if len(blocks) < 6 and rng.random() < 0.3:
                blocks.append(rng.randrange(90))
        chosen = rng.sample(live, rng.randrange(len(live) + 1))
        if not chosen:
            continue
        positions = [4 * len(blocks) - 1 - rng.randrange(4) for blocks in chosen]
        count = len(chosen)
        if rng.random() < 0.5:
            bucket = rng.randrange(count, 5)
            packed = packer.pack_decode(words, bucket, chosen, positions, [1] * count, [_SAMPLING] * count)
        else:
            rows = [TokenRows(b, [1], p, 1, _SAMPLING) for b, p in zip(chosen, positions, strict=True)]
            bucket, packed = 0, packer.pack(words, rows, draws=True)
        state.words[: packed.num_words] = torch.from_numpy(words[: packed.num_words])
        state.update(packed)
        batch = state.decode_batch(bucket) if bucket else state.batch(packed)
        for index, (blocks, position) in enumerate(zip(chosen, positions, strict=True)):
            assert batch.block_tables[index, : position // 4 + 1].tolist() == blocks[: position // 4 + 1]
            assert int(batch.slots[index]) == blocks[position // 4] * 4 + position % 4
        assert batch.slots[count:].tolist() == [4 * _SCRATCH] * (len(batch.slots) - count)
        assert batch.block_tables[count:].unique().tolist() in ([], [_SCRATCH])
