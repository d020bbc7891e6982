"""Noise and drawing of the Triton backend: the bits and the tokens of the reference."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import triton
import triton.language as tl

from baton.kernels import ops
from baton.kernels.reference.noise import _log
from baton.kernels.triton.noise import gumbel_of_bits

# The interpreter computes with numpy, which tells of infinities that are meant.
pytestmark = pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")

# temperature, top_k, top_p, min_p
OPTIONS = [
    (0.0, 0, 1.0, 0.0),
    (1.0, 0, 1.0, 0.0),
    (0.05, 0, 1.0, 0.0),
    (30.0, 0, 1.0, 0.0),
    (1e-38, 0, 1.0, 0.0),
    (1.0, 1, 1.0, 0.0),
    (0.7, 40, 1.0, 0.0),
    (1.0, 5000, 1.0, 0.0),
    (1.0, 0, 0.9, 0.0),
    (3.0, 0, 0.999, 0.0),
    (1.0, 0, 1e-9, 0.0),
    (1.0, 0, 1.0, 0.1),
    (1.0, 0, 1.0, 1.0),
    (1.2, 50, 0.8, 0.01),
    (1.2, 0, 0.6, 0.2),
]


def pack(seed: int, option: tuple[float, int, float, float]) -> bytes:
    temperature, top_k, top_p, min_p = option
    return ops.pack_sampling(seed=seed, temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)


def draw(logits: torch.Tensor, samplings: list[bytes], positions: list[int], rows: list[int]) -> list[int]:
    return [
        int(token)
        for token in ops.draw_tokens(
            logits, np.array(rows, dtype=np.int64), b"".join(samplings), np.array(positions, dtype=np.int64)
        )
    ]


def rows_of(kind: str, num_rows: int, vocab: int, seed: int) -> torch.Tensor:
    generator = np.random.default_rng(seed)
    rows = generator.normal(size=(num_rows, vocab)) * {"flat": 0.1, "peaked": 6.0}.get(kind, 2.0)
    if kind == "ties":
        rows = rows.round() * -0.5
    elif kind == "masked":
        rows[:, generator.random(vocab) < 0.9] = -np.inf
        rows[:, vocab // 2] = 0
    elif kind == "equal":
        rows[:] = 1.5
    elif kind == "far":
        rows = rows * 1e4
    return torch.from_numpy(rows.astype(np.float32))


@pytest.mark.parametrize(
    ("vocab", "kinds"),
    [
        (1, ["normal"]),
        (7, ["normal", "equal", "masked"]),
        (1031, ["normal", "flat", "peaked", "ties", "masked", "equal", "far"]),
        # More scores around the border than fit into the list: passes over the row narrow it first.
        (5000, ["normal", "flat", "equal"]),
    ],
    ids=["1", "7", "1031", "5000"],
)
def test_same_tokens_as_the_reference(triton_backend: torch.device, vocab: int, kinds: list[str]) -> None:
    for kind in kinds:
        logits = rows_of(kind, len(OPTIONS), vocab, seed=vocab).to(triton_backend)
        samplings = [pack(seed * 2**62 + 5, option) for seed, option in enumerate(OPTIONS)]
        rows = list(range(len(OPTIONS)))
        positions = [1000 * i for i in rows]
        with ops.use_backend("reference"):
            expected = draw(logits, samplings, positions, rows)
        assert draw(logits, samplings, positions, rows) == expected, kind


def test_same_tokens_for_random_parameters(triton_backend: torch.device) -> None:
    generator = np.random.default_rng(11)
    for _ in range(6):
        vocab = int(generator.integers(2, 400))
        options = [
            (
                float(generator.uniform(1e-4, 5)),
                int(generator.integers(0, 2 * vocab)) if generator.random() < 0.5 else 0,
                float(generator.random()) if generator.random() < 0.5 else 1.0,
                float(generator.random()) if generator.random() < 0.5 else 0.0,
            )
            for _ in range(12)
        ]
        samplings = [pack(int(generator.integers(2**63)), option) for option in options]
        positions = [int(position) for position in generator.integers(2**40, size=12)]
        rows = [int(row) for row in generator.integers(3, size=12)]
        logits = rows_of(str(generator.choice(["normal", "ties"])), 3, vocab, vocab).to(triton_backend)
        with ops.use_backend("reference"):
            expected = draw(logits, samplings, positions, rows)
        assert draw(logits, samplings, positions, rows) == expected, (vocab, options)


def test_into_given_memory_with_rows_of_a_wider_tensor(triton_backend: torch.device) -> None:
    """As a captured step calls it: padded requests, strided logits, memory that holds what the last step left."""
    logits = rows_of("normal", 4, 1100, seed=1).to(triton_backend)[:, :1031]
    packed = b"".join(pack(3, OPTIONS[i]) for i in (1, 6, 8, 13, 0))
    samplings = torch.from_numpy(np.frombuffer(packed, dtype=np.int64).reshape(5, 5).copy()).to(triton_backend)
    row_ids = torch.tensor([2, -1, 0, 3, -1], device=triton_backend)
    positions = torch.arange(5, device=triton_backend)
    out = torch.empty(5, dtype=torch.int64, device=triton_backend)
    workspace = ops.draw_workspace(8, triton_backend)
    found = []
    for garbage in (-1, 2**62):
        workspace.fill_(garbage)
        ops.draw_tokens_into(logits, row_ids, samplings, positions, out, workspace)
        found.append(out.tolist())
    with ops.use_backend("reference"):
        ops.draw_tokens_into(logits, row_ids, samplings, positions, out)
    assert found == [out.tolist()] * 2
    assert [token == ops.NOT_A_NUMBER for token in found[0]] == [False, True, False, False, True]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("place", [0, 1030])
def test_what_is_not_a_number_is_told(triton_backend: torch.device, bad: float, place: int) -> None:
    logits = rows_of("normal", 3, 1031, seed=0).to(triton_backend)
    logits[1, place] = bad
    for option in (OPTIONS[0], OPTIONS[1], OPTIONS[8]):
        tokens = draw(logits, [pack(0, option)] * 3, [0] * 3, [0, 1, 2])
        assert [token == ops.NOT_A_NUMBER for token in tokens] == [False, True, False]
    nothing = torch.full((1, 9), -float("inf"), device=triton_backend)
    assert draw(nothing, [pack(0, OPTIONS[1])], [0], [0]) == [ops.NOT_A_NUMBER]


def test_noise_has_the_reference_s_bits(triton_backend: torch.device) -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (5,)).to(triton_backend)
    positions = torch.randint(0, 2**40, (5,)).to(triton_backend)
    noise = ops.gumbel_noise(seeds, positions, 1500)
    with ops.use_backend("reference"):
        assert torch.equal(noise, ops.gumbel_noise(seeds, positions, 1500))


@triton.jit
def _gumbel_kernel(bits_ptr, out_ptr, BLOCK: tl.constexpr):
    lane = tl.arange(0, BLOCK)
    bits = tl.load(bits_ptr + lane).to(tl.uint64, bitcast=True)
    tl.store(out_ptr + lane, gumbel_of_bits(bits))


def test_noise_of_numbers_around_the_square_root_of_two(triton_backend: torch.device) -> None:
    """Where the logarithm changes its branch, in steps far below fp32."""
    u = 2**-0.5 + torch.linspace(-4e-8, 4e-8, 128, dtype=torch.float64)
    bits = ((u * 2.0**52).long() << 12).to(triton_backend)
    out = torch.empty(128, device=triton_backend)
    _gumbel_kernel[(1,)](bits, out, BLOCK=128, enable_fp_fusion=False)
    exact = (u * 2.0**52).floor() * 2.0**-52 + 2.0**-53
    assert torch.equal(out.cpu(), (-_log(-_log(exact))).float())


@pytest.mark.parametrize("backend", ops.available_backends())
def test_wrong_arguments_are_refused(backend: str) -> None:
    logits, one, out = torch.zeros(2, 5), torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
    with ops.use_backend(backend):
        with pytest.raises(ValueError, match=r"samplings must have shape \(1, 5\)"):
            ops.draw_tokens_into(logits, one, one, one, out)
        with pytest.raises(ValueError, match="int64"):
            ops.draw_tokens_into(logits, one, torch.zeros(1, 5), one, out)
        with pytest.raises(ValueError, match="float32"):
            ops.draw_tokens_into(logits.double(), one, torch.zeros(1, 5).long(), one, out)
