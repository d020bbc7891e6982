"""Drawing tokens on a GPU without sorting: the tokens of `reference/sampling.py`, for the same logits.

    top      (request, chunk of the vocabulary): the largest logit and its first token; +inf where one is NaN
    draw     (request, chunk): without filters, the best score + noise; for top_p, the sum of all weights
    choose   (request): puts the chunks together; with filters, finds the threshold and draws among what it keeps

Everything that decides is exact: the noise's bits, divisions rounded correctly, weights in fixed point (see
`noise.py`, `fixed_point.py`); maxima and integer sums do not depend on the order. Only where the noise need not be
looked at is estimated, on the safe side. So chunks, tiles and the batch cannot change a token.

Buffers are the caller's, nothing is read back: CUDA graphs can replay it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.fixed_point import LOWEST_KEY, key_of
from baton.kernels.triton.noise import EXACT, gumbel_of_bits, noise_bits, noise_key
from baton.kernels.triton.stream_launches import stream_launch
from baton.kernels.triton.thresholds import LISTED, kth_largest, nucleus, range_weight

__all__ = ["SAMPLING_WORDS", "WORKSPACE_WORDS", "compile_cases", "draw_tokens"]

SAMPLING_WORDS = 5
"""int64 per request: seed, top_k, and the bits of temperature, top_p and log_min_p (`reference/sampling.py`)."""

_MAX_CHUNKS = 32
WORKSPACE_WORDS = 5 * _MAX_CHUNKS + LISTED
"""int64 per request: of each chunk the top, its token, the best sum, its token, the weight; then keys."""

_PROGRAMS = 264
"""How many programs there should be for few requests: twice the multiprocessors of an H100 or H200."""

_CHUNKS = tl.constexpr(_MAX_CHUNKS)
_WORDS = tl.constexpr(WORKSPACE_WORDS)
_PARAMETERS = tl.constexpr(SAMPLING_WORDS)
_NO_TOKEN = tl.constexpr(0x7FFFFFFF)
_INF = tl.constexpr(float("inf"))


@triton.jit
def _best_of(scores, tokens):
    """The largest score and the smallest of its tokens."""
    best = tl.max(scores, 0)
    return best, tl.min(tl.where(scores == best, tokens, _NO_TOKEN), 0)


@triton.jit
def _better(best, token, other_best, other_token):
    """The better of two, by score, then by the smaller token."""
    takes = (other_best > best) | ((other_best == best) & (other_token < token))
    return tl.where(takes, other_best, best), tl.where(takes, other_token, token)


@triton.jit
def _float_at(pointer):
    return tl.load(pointer).to(tl.float64, bitcast=True)


@triton.jit
def _top_of_row(parts, num_chunks):
    """What the chunks of a row hold at most, and where."""
    chunk = tl.arange(0, _CHUNKS)
    live = chunk < num_chunks
    tops = tl.load(parts + chunk, mask=live, other=0).to(tl.int32).to(tl.float32, bitcast=True)
    tokens = tl.load(parts + _CHUNKS + chunk, mask=live, other=0).to(tl.int32)
    return _best_of(tl.where(live, tops, -_INF), tokens)


@triton.jit
def _least_key(best, log_min_p):
    """The least key of a score that min_p keeps, and that is a finite number."""
    exact = best.to(tl.float64) + log_min_p
    rounded = exact.to(tl.float32)
    least = key_of(rounded) + tl.where(rounded.to(tl.float64) < exact, 1, 0)
    return tl.maximum(least, LOWEST_KEY)


@triton.jit
def _top_kernel(logits_ptr, rows_ptr, parts_ptr, logits_row, vocab, chunk_size, BLOCK: tl.constexpr):
    request = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    row = tl.load(rows_ptr + request)
    top = tl.full([], -_INF, tl.float32)
    token = tl.full([], _NO_TOKEN, tl.int32)
    if row >= 0:
        for start in range(chunk * chunk_size, tl.minimum(chunk * chunk_size + chunk_size, vocab), BLOCK):
            tokens = start + tl.arange(0, BLOCK)
            x = tl.load(logits_ptr + row * logits_row + tokens, mask=tokens < vocab, other=-_INF)
            tile_top, tile_token = _best_of(tl.where(x == x, x, _INF), tokens)
            top, token = _better(top, token, tile_top, tile_token)
    parts = parts_ptr + request * _WORDS + chunk
    tl.store(parts, top.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(parts + _CHUNKS, token.to(tl.int64))


@triton.jit(do_not_specialize=["num_chunks"])
def _draw_kernel(
    logits_ptr,
    rows_ptr,
    samplings_ptr,
    positions_ptr,
    parts_ptr,
    logits_row,
    vocab,
    chunk_size,
    num_chunks,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    chunk = tl.program_id(1)
    parts = parts_ptr + request * _WORDS
    top, top_token = _top_of_row(parts, num_chunks)
    sampling = samplings_ptr + request * _PARAMETERS
    temperature = _float_at(sampling + 2).to(tl.float32)
    begin = chunk * chunk_size
    end = tl.minimum(begin + chunk_size, vocab)
    if (tl.abs(top) < _INF) & (temperature > 0.0):
        best = tl.div_rn(top, temperature)
        top_k = tl.load(sampling + 1)
        top_p = _float_at(sampling + 3)
        log_min_p = _float_at(sampling + 4)
        has_top_k = (top_k > 0) & (top_k < vocab)
        logits = logits_ptr + tl.load(rows_ptr + request) * logits_row
        if (tl.abs(best) < _INF) & (has_top_k == 0):
            if (top_p >= 1.0) & (log_min_p == -_INF):
                key = noise_key(tl.load(sampling), tl.load(positions_ptr + request))
                # What any token has to beat, in every chunk.
                best_sum = gumbel_of_bits(noise_bits(key, top_token)) + best
                token = top_token
                for start in range(begin, end, BLOCK):
                    tokens = start + tl.arange(0, BLOCK)
                    live = tokens < vocab
                    x = tl.load(logits + tokens, mask=live, other=-_INF)
                    scores = tl.div_rn(x, tl.zeros_like(x) + temperature)
                    bits = noise_bits(key, tokens)
                    # With u uniform in (0, 1), noise -log(-log u) lifts a score to a sum only if 1 - u <= -log u <=
                    # exp(score - sum). The slack is far more than what rounding does to sums and estimates.
                    missing = ((bits ^ 0xFFFFFFFFFFFFFFFF) >> 12).to(tl.int64).to(tl.float32)
                    slack = (tl.abs(best_sum) + 64.0) * 9.5367431640625e-07
                    reach = tl.exp2((scores - (best_sum - slack)) * 1.4426950408889634) * 4.504050160e15
                    may_win = live & (reach >= missing)
                    if tl.max(may_win.to(tl.int32), 0) > 0:
                        sums = tl.where(may_win, gumbel_of_bits(bits) + scores, -_INF)
                        tile_best, tile_token = _best_of(sums, tl.where(may_win, tokens, _NO_TOKEN))
                        best_sum, token = _better(best_sum, token, tile_best, tile_token)
                tl.store(parts + 2 * _CHUNKS + chunk, best_sum.to(tl.int32, bitcast=True).to(tl.int64))
                tl.store(parts + 3 * _CHUNKS + chunk, token.to(tl.int64))
            elif top_p < 1.0:
                least = _least_key(best, log_min_p)
                _, weight = range_weight(logits, vocab, begin, end, temperature, best, least, key_of(best) + 1, BLOCK)
                tl.store(parts + 4 * _CHUNKS + chunk, weight)


@triton.jit
def _draw_from(logits, vocab, temperature, border, num_ties, key, BLOCK: tl.constexpr):
    """Argmax of score + noise among keys above `border` and the first `num_ties` tokens on it."""
    best_sum = tl.full([], -_INF, tl.float32)
    token = tl.full([], _NO_TOKEN, tl.int32)
    ties_before = 0
    for start in range(0, vocab, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        live = tokens < vocab
        x = tl.load(logits + tokens, mask=live, other=-_INF)
        scores = tl.div_rn(x, tl.zeros_like(x) + temperature)
        keys = key_of(scores)
        if tl.max((live & (keys >= border)).to(tl.int32), 0) > 0:
            ties = (live & (keys == border)).to(tl.int32)
            rank = ties_before + tl.cumsum(ties, 0) - ties
            ties_before += tl.sum(ties, 0)
            keep = live & ((keys > border) | ((ties > 0) & (rank < num_ties)))
            sums = tl.where(keep, gumbel_of_bits(noise_bits(key, tokens)) + scores, -_INF)
            tile_best, tile_token = _best_of(sums, tl.where(keep, tokens, _NO_TOKEN))
            best_sum, token = _better(best_sum, token, tile_best, tile_token)
    return token


@triton.jit(do_not_specialize=["num_chunks"])
def _choose_kernel(
    logits_ptr,
    rows_ptr,
    samplings_ptr,
    positions_ptr,
    parts_ptr,
    out_ptr,
    logits_row,
    vocab,
    num_chunks,
    BLOCK: tl.constexpr,
):
    request = tl.program_id(0).to(tl.int64)
    parts = parts_ptr + request * _WORDS
    top, top_token = _top_of_row(parts, num_chunks)
    sampling = samplings_ptr + request * _PARAMETERS
    temperature = _float_at(sampling + 2).to(tl.float32)
    token = tl.full([], -1, tl.int32)
    if tl.abs(top) < _INF:
        token = top_token
        if temperature > 0.0:
            best = tl.div_rn(top, temperature)
            top_k = tl.load(sampling + 1)
            top_p = _float_at(sampling + 3)
            log_min_p = _float_at(sampling + 4)
            is_finite = tl.abs(best) < _INF
            has_top_k = (top_k > 0) & (top_k < vocab) & is_finite
            has_top_p = (top_p < 1.0) & is_finite
            if is_finite & (has_top_k == 0) & (has_top_p == 0) & (log_min_p == -_INF):
                chunk = tl.arange(0, _CHUNKS)
                live = chunk < num_chunks
                sums = tl.load(parts + 2 * _CHUNKS + chunk, mask=live, other=0)
                sums = tl.where(live, sums.to(tl.int32).to(tl.float32, bitcast=True), -_INF)
                tokens = tl.load(parts + 3 * _CHUNKS + chunk, mask=live, other=0).to(tl.int32)
                _, token = _best_of(sums, tokens)
            else:
                logits = logits_ptr + tl.load(rows_ptr + request) * logits_row
                # Where the division overflowed, all that did are the best.
                border = key_of(best)
                num_ties = vocab
                if is_finite:
                    border = _least_key(best, log_min_p)
                if has_top_k:
                    kth = kth_largest(logits, vocab, top_k, BLOCK)
                    border = tl.maximum(border, key_of(tl.div_rn(kth, temperature)))
                if has_top_p:
                    if has_top_k:
                        _, total = range_weight(
                            logits, vocab, 0, vocab, temperature, best, border, key_of(best) + 1, BLOCK
                        )
                    else:
                        chunk = tl.arange(0, _CHUNKS)
                        total = tl.sum(tl.load(parts + 4 * _CHUNKS + chunk, mask=chunk < num_chunks, other=0), 0)
                    exact = tl.ceil(top_p * total.to(tl.float64))
                    limit = tl.where(exact < total.to(tl.float64), exact.to(tl.int64), total)
                    border, num_ties = nucleus(
                        logits, vocab, temperature, best, border, limit, parts + 5 * _CHUNKS, BLOCK
                    )
                key = noise_key(tl.load(sampling), tl.load(positions_ptr + request))
                token = _draw_from(logits, vocab, temperature, border, num_ties, key, BLOCK)
    tl.store(out_ptr + request, token.to(tl.int64))


def draw_tokens(
    logits: Tensor, row_ids: Tensor, samplings: Tensor, positions: Tensor, out: Tensor, workspace: Tensor
) -> None:
    """See `ops.draw_tokens_into`."""
    num_requests, vocab = out.shape[0], logits.shape[1]
    if num_requests == 0:
        return
    launch = stream_launch("sampling", vocab)
    block, options = launch.tiles["BLOCK"], {"num_warps": launch.num_warps, "enable_fp_fusion": False}
    num_tiles = triton.cdiv(vocab, block)
    # Chunks are whole tiles, so their size is a multiple of 16 in every batch: nothing is compiled anew.
    wanted = min(num_tiles, _MAX_CHUNKS, triton.cdiv(_PROGRAMS, num_requests))
    chunk_size = triton.cdiv(num_tiles, wanted) * block
    num_chunks = triton.cdiv(vocab, chunk_size)
    row = logits.stride(0)
    grid = (num_requests, num_chunks)
    _top_kernel[grid](logits, row_ids, workspace, row, vocab, chunk_size, BLOCK=block, **options)
    _draw_kernel[grid](
        logits,
        row_ids,
        samplings,
        positions,
        workspace,
        row,
        vocab,
        chunk_size,
        num_chunks,
        BLOCK=block,
        **options,
    )
    launch = stream_launch("choosing", vocab)
    _choose_kernel[(num_requests,)](
        logits,
        row_ids,
        samplings,
        positions,
        workspace,
        out,
        row,
        vocab,
        num_chunks,
        BLOCK=launch.tiles["BLOCK"],
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """The three kernels at a large vocabulary; nothing in them may be fused, and divisions are exact."""
    pointers = {"logits_ptr": "*fp32", "rows_ptr": "*i64", "parts_ptr": "*i64"}
    inputs = {"samplings_ptr": "*i64", "positions_ptr": "*i64"}
    vectors = ("ld.global.v4.b32",)
    exact = (*vectors, *EXACT, "div.rn.f32")
    kernels = (
        (_top_kernel, "sampling", pointers | dict.fromkeys(("logits_row", "vocab", "chunk_size"), "i32"), vectors),
        (
            _draw_kernel,
            "sampling",
            pointers | inputs | dict.fromkeys(("logits_row", "vocab", "chunk_size", "num_chunks"), "i32"),
            exact,
        ),
        (
            _choose_kernel,
            "choosing",
            pointers | inputs | {"out_ptr": "*i64"} | dict.fromkeys(("logits_row", "vocab", "num_chunks"), "i32"),
            exact,
        ),
    )
    for vocab in (1000, 128256):
        for kernel, entry, types, uses in kernels:
            launch = stream_launch(entry, vocab)
            yield CompileCase(
                name=f"sampling/{kernel.__name__.strip('_')}/{vocab}",
                kernel=kernel,
                types=types,
                constants=dict(launch.tiles),
                launch=launch,
                uses={80: uses, 90: uses},
                options={"enable_fp_fusion": False},
                absent=("fma.rn.f64", "fma.rn.f32"),
            )
