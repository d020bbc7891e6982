"""Log-sum-exp, and the noise of the sampler: the same bits on every backend, and really random."""

from __future__ import annotations

import math

import pytest
import torch

from baton.kernels import ops
from baton.kernels.reference.noise import uniform_bits

# Of (seed 42, position 7), tokens 0 and 1; and noise of seeds 0, 42, -1 at positions 0, 7, 2^40, tokens 0 to 2.
KNOWN_BITS = [-4612922627616736020, -2433035797859392319]
KNOWN_NOISE = [
    ["-0x1.4c77e60000000p-4", "-0x1.1681ba0000000p-2", "-0x1.0f73aa0000000p-2"],
    ["0x1.3edee60000000p+0", "0x1.f4b3400000000p+0", "0x1.88183c0000000p+0"],
    ["-0x1.0a62fe0000000p-1", "0x1.274a740000000p+0", "-0x1.aa25b80000000p-1"],
]


@pytest.mark.parametrize("vocab", [1, 7, 100, 1023, 4096, 32001])
def test_lse(any_backend: str, vocab: int) -> None:
    logits = 10 * torch.randn(5, vocab)
    logits[1, vocab // 2] = -math.inf
    logits[2] += 1e4
    expected = torch.logsumexp(logits.double(), -1)
    torch.testing.assert_close(ops.logits_lse(logits).double(), expected, atol=2e-6, rtol=1e-6)


def test_lse_of_nothing(any_backend: str) -> None:
    assert ops.logits_lse(torch.full((2, 40), -math.inf)).tolist() == [-math.inf, -math.inf]


def test_lse_rows_do_not_depend_on_company(native: str) -> None:
    logits = torch.randn(63, 4099)
    single = torch.cat([ops.logits_lse(logits[i : i + 1]) for i in range(63)])
    assert torch.equal(ops.logits_lse(logits), single)
    ops.set_num_threads(2)
    assert torch.equal(ops.logits_lse(logits), single)


def test_noise_is_equal_on_every_backend(native: str) -> None:
    seeds = torch.randint(-(2**63), 2**63 - 1, (9,))
    positions = torch.randint(0, 2**31, (9,))
    noise = ops.gumbel_noise(seeds, positions, 4099)
    with ops.use_backend("reference"):
        assert torch.equal(noise, ops.gumbel_noise(seeds, positions, 4099))
    assert torch.equal(noise[3:4, :123], ops.gumbel_noise(seeds[3:4], positions[3:4], 123))


def test_noise_is_the_gumbel_transform_of_the_bits() -> None:
    seeds, positions = torch.arange(20), torch.arange(20) * 7
    bits = uniform_bits(seeds, positions, 1000)
    u = ((bits >> 12) & ((1 << 52) - 1)).double() * 2.0**-52 + 2.0**-53
    expected = -torch.log(-torch.log(u))
    torch.testing.assert_close(ops.gumbel_noise(seeds, positions, 1000).double(), expected, atol=1e-7, rtol=2e-7)


def test_noise_never_changes_between_versions() -> None:
    """Known answers: a change of the generator changes every sampled completion."""
    noise = ops.gumbel_noise(torch.tensor([0, 42, -1]), torch.tensor([0, 7, 1 << 40]), 3)
    assert uniform_bits(torch.tensor([42]), torch.tensor([7]), 2)[0].tolist() == KNOWN_BITS
    assert [[x.hex() for x in row] for row in noise.tolist()] == KNOWN_NOISE


def _chi_squared_z(counts: torch.Tensor) -> float:
    """How many standard deviations the chi-squared statistic of uniform counts lies off its mean."""
    expected = counts.sum().double() / counts.numel()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    degrees = counts.numel() - 1
    return (statistic - degrees) / math.sqrt(2 * degrees)


def _bytes(bits: torch.Tensor) -> torch.Tensor:
    return bits.contiguous().view(torch.uint8).reshape(-1, 8)


ROWS = {
    "tokens": lambda: uniform_bits(torch.tensor([5]), torch.tensor([9]), 1 << 18)[0],
    "positions": lambda: uniform_bits(torch.full((1 << 18,), 5), torch.arange(1 << 18), 1)[:, 0],
    "seeds": lambda: uniform_bits(torch.arange(1 << 18), torch.full((1 << 18,), 9), 1)[:, 0],
}


@pytest.mark.parametrize("axis", ROWS)
def test_bits_are_uniform_along_each_axis(axis: str) -> None:
    """Every byte of the word, and the pairs of neighbours' top bytes, over consecutive tokens, positions, seeds."""
    words = _bytes(ROWS[axis]()).long()
    for byte in range(8):
        assert abs(_chi_squared_z(torch.bincount(words[:, byte], minlength=256))) < 4.5
    top = words[:, 7] >> 2
    assert abs(_chi_squared_z(torch.bincount(top[:-1] * 64 + top[1:], minlength=4096))) < 4.5


@pytest.mark.parametrize("flipped", ["seed", "position"])
def test_one_flipped_input_bit_flips_half_of_the_output(flipped: str) -> None:
    base, where = torch.randint(2**62, (4000,)), torch.randint(2**31, (4000,))
    before = uniform_bits(base, where, 1)
    for bit in (0, 1, 13, 30, 62):
        mask = 1 << bit
        after = uniform_bits(base ^ mask, where, 1) if flipped == "seed" else uniform_bits(base, where ^ mask, 1)
        share = _bytes(before ^ after).unsqueeze(-1).bitwise_and(2 ** torch.arange(8, dtype=torch.uint8)).ne(0)
        per_bit = share.double().mean(0)
        assert float((per_bit - 0.5).abs().max()) < 0.05
        assert abs(float(share.double().mean()) - 0.5) < 0.005


def test_argmax_with_noise_draws_from_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.25, 0.125, 0.1, 0.025])
    draws = 200_000
    for seeds, positions in (
        (torch.zeros(draws).long(), torch.arange(draws)),
        (torch.arange(draws), torch.ones(draws).long()),
    ):
        noise = ops.gumbel_noise(seeds, positions, 5)
        counts = torch.bincount((probabilities.log() + noise).argmax(-1), minlength=5).double()
        expected = probabilities.double() * draws
        assert float(((counts - expected) ** 2 / expected).sum()) < 23.5  # 4 degrees of freedom, p = 1e-4


def test_bad_arguments_are_refused() -> None:
    seeds = torch.arange(3)
    with pytest.raises(ValueError, match="positions"):
        ops.gumbel_noise(seeds, torch.arange(2), 10)
    with pytest.raises(ValueError, match="int64"):
        ops.gumbel_noise(seeds.int(), seeds, 10)
    with pytest.raises(ValueError, match="vocab"):
        ops.gumbel_noise(seeds, seeds, 0)
    with pytest.raises(ValueError, match="float32"):
        ops.logits_lse(torch.ones(2, 5).double())
