"""The library draws the very tokens of the reference, whatever the rows look like and however many there are."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.kernels import ops

NATIVE = [name for name in ops.available_backends() if name.startswith("cpu-")]
OPTIONS = [
    {"temperature": 0.0},
    {"temperature": 1.0},
    {"temperature": 0.05},
    {"temperature": 30.0},
    {"temperature": 1.0, "top_k": 1},
    {"temperature": 0.7, "top_k": 40},
    {"temperature": 1.0, "top_k": 5000},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 3.0, "top_p": 0.999},
    {"temperature": 1.0, "top_p": 1e-9},
    {"temperature": 1.0, "min_p": 0.1},
    {"temperature": 1.0, "min_p": 1.0},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.8, "min_p": 0.01},
    {"temperature": 1.2, "top_k": 30, "top_p": 0.95},
]


def pack(seed: int, options: dict[str, float]) -> bytes:
    defaults = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0}
    return ops.pack_sampling(seed=seed, **(defaults | options))  # type: ignore[arg-type]


def draw(logits: torch.Tensor, samplings: list[bytes], positions: list[int]) -> list[int]:
    rows = np.arange(len(samplings), dtype=np.int64)
    tokens = ops.draw_tokens(logits, rows, b"".join(samplings), np.array(positions, dtype=np.int64))
    return [int(token) for token in tokens]


def rows_of(kind: str, num_rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(num_rows, vocab)) * {"flat": 0.1, "peaked": 6.0}.get(kind, 2.0)
    if kind == "ties":
        rows = rows.round()
    elif kind == "bfloat16":
        return torch.from_numpy(rows).to(torch.bfloat16).float()
    elif kind == "masked":
        rows[:, generator.random(vocab) < 0.9] = -np.inf
        rows[:, vocab // 2] = 0
    elif kind == "equal":
        rows[:] = 1.5
    elif kind == "far":
        rows = rows * 1e4
    return torch.from_numpy(rows.astype(np.float32))


@pytest.mark.parametrize("backend", NATIVE)
@pytest.mark.parametrize("kind", ["normal", "flat", "peaked", "ties", "bfloat16", "masked", "equal", "far"])
@pytest.mark.parametrize("vocab", [1, 7, 63, 1031, 8000])
def test_same_tokens_as_the_reference(backend: str, kind: str, vocab: int) -> None:
    logits = rows_of(kind, len(OPTIONS), vocab, seed=vocab)
    for seed in range(4):
        samplings = [pack(seed * 2**62 + 5, options) for options in OPTIONS]
        positions = [seed * 1000 + i for i in range(len(OPTIONS))]
        with ops.use_backend("reference"):
            expected = draw(logits, samplings, positions)
        with ops.use_backend(backend):
            assert draw(logits, samplings, positions) == expected


@pytest.mark.parametrize("backend", NATIVE)
@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**64 - 1),
    position=st.integers(0, 2**40),
    temperature=st.floats(1e-4, 50),
    top_k=st.integers(0, 300),
    top_p=st.floats(1e-6, 1.0),
    min_p=st.floats(0.0, 1.0),
    vocab=st.integers(1, 300),
)
def test_same_tokens_for_any_parameters(
    backend: str, seed: int, position: int, temperature: float, top_k: int, top_p: float, min_p: float, vocab: int
) -> None:
    logits = rows_of("ties" if seed % 2 else "normal", 1, vocab, seed % 1000)
    sampling = ops.pack_sampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    with ops.use_backend("reference"):
        expected = draw(logits, [sampling], [position])
    with ops.use_backend(backend):
        assert draw(logits, [sampling], [position]) == expected


def test_rows_are_found_by_their_ids_and_do_not_see_each_other() -> None:
    logits = rows_of("normal", 40, 3001, seed=3)
    samplings = [pack(i, OPTIONS[i % len(OPTIONS)]) for i in range(40)]
    alone = [draw(logits[i : i + 1], [samplings[i]], [i]) for i in range(40)]
    order = np.random.default_rng(1).permutation(40)
    previous = ops.num_threads()
    try:
        for threads in (1, 3):
            ops.set_num_threads(threads)
            tokens = ops.draw_tokens(
                logits.as_strided((40, 3001), (3001, 1)), order, b"".join(samplings[i] for i in order), order
            )
            assert [[int(token)] for token in tokens] == [alone[i] for i in order]
    finally:
        ops.set_num_threads(previous)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 500, 1030])
def test_what_is_not_a_number_is_told(bad: float, place: int) -> None:
    logits = rows_of("normal", 3, 1031, seed=0)
    logits[1, place] = bad
    for options in ({"temperature": 0.0}, {"temperature": 1.0}, {"temperature": 1.0, "top_p": 0.5}):
        tokens = draw(logits, [pack(0, options)] * 3, [0] * 3)
        assert [token == ops.NOT_A_NUMBER for token in tokens] == [False, True, False]
    assert draw(torch.full((1, 9), -float("inf")), [pack(0, {})], [0]) == [ops.NOT_A_NUMBER]


def test_wrong_arguments_are_refused() -> None:
    logits, zero = torch.zeros(2, 5), np.zeros(1, dtype=np.int64)
    for rows in ([2], [-1]):
        with pytest.raises(ValueError, match="row_ids must be in"):
            ops.draw_tokens(logits, np.array(rows, dtype=np.int64), pack(0, {}), zero)
    with pytest.raises(ValueError, match="bytes of samplings"):
        ops.draw_tokens(logits, zero, b"", zero)
    with pytest.raises(ValueError, match="int64"):
        ops.draw_tokens(logits, zero.astype(np.int32), pack(0, {}), zero)
