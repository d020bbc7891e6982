"""Thresholds of top_k and top_p without sorting: what the kernels of `sampling.py` call.

The k-th largest logit is found by its digits, four passes of eight bits. The border of top_p is found by bisection over
scores as integers: passes over the row until few enough scores lie around it, then in registers.
"""

from __future__ import annotations

import triton
import triton.language as tl

from baton.kernels.triton.fixed_point import key_of, score_of, weight_of

__all__ = ["LISTED", "kth_largest", "nucleus", "range_weight"]

LISTED = 2048
"""Scores that are bisected in registers; a caller of `nucleus` has room for as many keys."""

_LISTED_KEYS = tl.constexpr(LISTED)
_INF = tl.constexpr(float("inf"))


@triton.jit
def range_weight(logits, vocab, begin, end, temperature, best, low, high, BLOCK: tl.constexpr):
    """How many scores of tokens begin..end-1 have keys in [low, high), and their weight; whole tiles up to `vocab`."""
    count = 0
    weight = tl.zeros([], dtype=tl.int64)
    for start in range(begin, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        x = tl.load(logits + tokens, mask=tokens < vocab, other=-_INF)
        scores = tl.div_rn(x, tl.zeros_like(x) + temperature)
        keys = key_of(scores)
        inside = (keys >= low) & (keys < high)
        found = tl.sum(inside.to(tl.int32), 0)
        if found > 0:
            count += found
            weight += tl.sum(tl.where(inside, weight_of(tl.where(inside, scores, best), best), 0), 0)
    return count, weight


@triton.jit
def kth_largest(logits, vocab, k, BLOCK: tl.constexpr):
    """The k-th largest logit of a row, 0 < k < vocab."""
    prefix = tl.zeros([], dtype=tl.uint32)
    left = k.to(tl.int32)
    digit_of = tl.arange(0, 256)
    for step in tl.static_range(4):
        shift = 24 - 8 * step
        counts = tl.zeros([256], dtype=tl.int32)
        for start in range(0, vocab, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = tl.load(logits + tokens, mask=tokens < vocab, other=-_INF)
            # As unsigned, in the same order.
            keys = key_of(x).to(tl.uint32, bitcast=True) ^ 0x80000000
            live = tokens < vocab
            if step > 0:
                live = live & ((keys >> (shift + 8)) == prefix)
            digits = ((keys >> shift) & 0xFF).to(tl.int32)
            counts += tl.histogram(digits, 256, mask=live)
        from_here = tl.sum(counts, 0) - tl.cumsum(counts, 0) + counts
        digit = tl.max(tl.where(from_here >= left, digit_of, 0), 0)
        left -= tl.sum(tl.where(digit_of > digit, counts, 0), 0)
        prefix = (prefix << 8) | digit.to(tl.uint32)
    return score_of((prefix ^ 0x80000000).to(tl.int32, bitcast=True))


@triton.jit
def _middle(low, high):
    """(low + high) // 2, which never overflows."""
    return (low >> 1) + (high >> 1) + (low & high & 1)


@triton.jit
def nucleus(logits, vocab, temperature, best, least, limit, listed, BLOCK: tl.constexpr):
    """The border of top_p among scores with keys from `least` on: (its key, how many scores of that key are kept)."""
    low = least
    high = key_of(best) + 1
    # Of [low, high): how many there may be. And the weight from `high` on, which is less than the limit.
    inside = vocab
    above = tl.zeros([], dtype=tl.int64)
    step = 0
    while (low + 1 < high) & (inside > _LISTED_KEYS):
        # A few likely tokens are usually enough.
        middle = _middle(low, high)
        if step == 0:
            middle = key_of(best - 5.0)
        if step == 1:
            middle = key_of(best - 12.0)
        middle = tl.minimum(tl.maximum(middle, low + 1), high - 1)
        count, weight = range_weight(logits, vocab, 0, vocab, temperature, best, middle, high, BLOCK)
        reaches = above + weight >= limit
        low = tl.where(reaches, middle, low)
        high = tl.where(reaches, high, middle)
        above = tl.where(reaches, above, above + weight)
        inside = tl.where(reaches, count, inside - count)
        step += 1
    if low + 1 < high:
        filled = 0
        for start in range(0, vocab, BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = tl.load(logits + tokens, mask=tokens < vocab, other=-_INF)
            keys = key_of(tl.div_rn(x, tl.zeros_like(x) + temperature))
            fits = ((keys >= low) & (keys < high)).to(tl.int32)
            found = tl.sum(fits, 0)
            if found > 0:
                places = filled + tl.cumsum(fits, 0) - fits
                tl.store(listed + places, keys.to(tl.int64), mask=fits > 0)
                filled += found
        # What one thread has stored, another one loads from here on.
        tl.debug_barrier()
        place = tl.arange(0, _LISTED_KEYS)
        keys = tl.load(listed + place, mask=place < filled, other=0).to(tl.int32)
        weights = tl.where(place < filled, weight_of(tl.where(place < filled, score_of(keys), best), best), 0)
        while low + 1 < high:
            middle = _middle(low, high)
            weight = tl.sum(tl.where((keys >= middle) & (keys < high), weights, 0), 0)
            reaches = above + weight >= limit
            low = tl.where(reaches, middle, low)
            high = tl.where(reaches, high, middle)
            above = tl.where(reaches, above, above + weight)
    each = weight_of(score_of(low), best)
    return low, ((limit - above + each - 1) // each).to(tl.int32)
