"""Drawing tokens in plain numpy, row by row; the CPU library gives the same tokens.

A token is `argmax(logits / temperature + g)` over the kept tokens, where g is the noise of `reference/noise.py`, and
ties go to the smallest id; with temperature 0 it is `argmax(logits)`. Divisions and sums are fp32.

top_p adds weights up in fixed point, `floor(exp(logit - largest) * 2^40)`, with an `exp` of fixed fp64 steps: such sums
are the same in every order and on every machine.
"""

from __future__ import annotations

import math
import struct

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.reference import noise

__all__ = ["NOT_A_NUMBER", "PACKED_BYTES", "draw_tokens", "keep_mask", "pack_sampling"]

NOT_A_NUMBER = -1
_PACKED = struct.Struct("<Qqddd")
PACKED_BYTES = _PACKED.size
_WEIGHT_BITS = 40
_WEIGHTLESS_BELOW = -28.0
_LOG2_E = 1.4426950408889634
_EXP2 = (
    4.4455382718708116e-10,
    7.054911620801123e-09,
    1.01780860092397e-07,
    1.321548679014431e-06,
    1.5252733804059841e-05,
    0.0001540353039338161,
    0.0013333558146428443,
    0.009618129107628477,
    0.05550410866482158,
    0.2402265069591007,
    0.6931471805599453,
    1.0,
)
"""Taylor coefficients of 2^x, highest power first."""

Floats = npt.NDArray[np.float32]


def pack_sampling(*, seed: int, temperature: float, top_k: int, top_p: float, min_p: float) -> bytes:
    """What `draw_tokens` needs of one request; temperature 0 is greedy, top_k 0, top_p 1 and min_p 0 are off."""
    log_min_p = math.log(min_p) if min_p > 0.0 else -math.inf
    return _PACKED.pack(seed & 0xFFFFFFFFFFFFFFFF, top_k, float(np.float32(temperature)), top_p, log_min_p)


def draw_tokens(
    logits: Tensor, row_ids: npt.NDArray[np.int64], samplings: bytes, positions: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """See `ops.draw_tokens`."""
    raw: Floats = logits.numpy(force=True)
    tokens = np.empty(len(row_ids), dtype=np.int64)
    for index, (seed, top_k, temperature, top_p, log_min_p) in enumerate(_PACKED.iter_unpack(samplings)):
        row = raw[row_ids[index]]
        greedy = int(row.argmax())  # finds NaN before any number
        if not np.isfinite(row[greedy]):
            tokens[index] = NOT_A_NUMBER
        elif temperature == 0.0:
            tokens[index] = greedy
        else:
            scores = row / np.float32(temperature)
            sums = _noise(seed, int(positions[index]), row.size) + scores
            if top_k or top_p < 1.0 or log_min_p > -math.inf:
                sums[~keep_mask(scores, log_min_p=log_min_p, top_k=top_k, top_p=top_p)] = -np.inf
            tokens[index] = sums.argmax()
    return tokens


def keep_mask(row: Floats, *, log_min_p: float, top_k: int, top_p: float) -> npt.NDArray[np.bool_]:
    """Which entries of `row` [vocab_size] (logits after temperature) may be drawn; the most likely one always may.

    min_p keeps p >= min_p * max p; top_k keeps the k largest (ties with the k-th too); top_p keeps, among what is left,
    the most likely tokens up to and including the one with which their renormalised sum reaches top_p (ties by id).
    """
    keep = np.isfinite(row)
    best = row.max()
    if log_min_p > -math.inf:
        keep &= row.astype(np.float64) >= float(best) + log_min_p
    if 0 < top_k < row.size:
        keep &= row >= np.partition(row, row.size - top_k)[row.size - top_k]
    if top_p < 1.0:
        candidates = np.flatnonzero(keep)
        weights = _weights(row[candidates].astype(np.float64) - float(best))
        # By logit, not by weight: two logits may round to one weight, and the larger still comes first.
        order = np.argsort(-row[candidates], kind="stable")
        before = np.cumsum(weights[order])
        total = int(before[-1])
        before -= weights[order]
        limit = math.ceil(top_p * float(total))
        keep[candidates[order[before >= min(limit, total)]]] = False
    keep[int(row.argmax())] = True
    return keep


def _weights(differences: npt.NDArray[np.float64]) -> npt.NDArray[np.int64]:
    """`floor(exp(d) * 2^40)` of d <= 0."""
    scaled = np.maximum(differences, _WEIGHTLESS_BELOW) * _LOG2_E
    whole = np.rint(scaled)
    rest = scaled - whole
    power = np.full_like(rest, _EXP2[0])
    for coefficient in _EXP2[1:]:
        power = power * rest + coefficient
    return np.ldexp(power, whole.astype(np.int32) + _WEIGHT_BITS).astype(np.int64)


def _noise(seed: int, position: int, vocab: int) -> Floats:
    out = torch.empty((1, vocab), dtype=torch.float32)
    seeds = torch.from_numpy(np.array([seed], dtype=np.uint64).view(np.int64))
    noise.gumbel_noise(seeds, torch.tensor([position]), out)
    row: Floats = out[0].numpy()
    return row
