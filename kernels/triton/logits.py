"""Log-sum-exp of logits, and what requests do to theirs, on a GPU; mirrors `reference/logits.py`.

Processing is one pass in place over the rows whose slot changes anything. Every step is rounded as numpy rounds it on
the host (`engine/logits.py`): divisions are exact, nothing is fused.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.logits_tables import LogitsTables
from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.launch_table import Launch
from baton.kernels.triton.stream_launches import stream_launch

__all__ = ["compile_cases", "count_tokens", "logits_lse", "process_logits"]

_INF = tl.constexpr(float("inf"))
_COUNT = Launch.of(1, 1, BLOCK=32)


@triton.jit
def _lse_kernel(logits_ptr, out_ptr, logits_row, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    tops = tl.full([BLOCK], -_INF, tl.float32)
    for start in range(0, vocab, BLOCK):
        x = tl.load(logits_ptr + row * logits_row + start + lane, mask=start + lane < vocab, other=-_INF)
        tops = tl.maximum(tops, x)
    top = tl.max(tops, 0)
    if tl.abs(top) < _INF:
        sums = tl.zeros([BLOCK], dtype=tl.float32)
        for start in range(0, vocab, BLOCK):
            x = tl.load(logits_ptr + row * logits_row + start + lane, mask=start + lane < vocab, other=-_INF)
            sums += tl.exp(x - top)
        tl.store(out_ptr + row, top + tl.log(tl.sum(sums, 0)))
    else:
        tl.store(out_ptr + row, top)


@triton.jit
def _has_bit(words, token, mask):
    return ((tl.load(words + token // 32, mask=mask, other=0) >> (token % 32)) & 1) > 0


@triton.jit
def _process_kernel(
    logits_ptr,
    slots_ptr,
    allowed_ptr,
    prompt_ptr,
    counts_ptr,
    penalties_ptr,
    bias_ids_ptr,
    bias_ptr,
    end_ids_ptr,
    is_restricted_ptr,
    num_bias_ptr,
    num_ends_ptr,
    min_tokens_ptr,
    num_outputs_ptr,
    logits_row,
    vocab,
    words_row,
    bias_row,
    ends_row,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    token = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row).to(tl.int64)
    if slot >= 0:
        is_restricted = tl.load(is_restricted_ptr + slot) != 0
        num_bias = tl.load(num_bias_ptr + slot)
        num_ends = tl.load(num_ends_ptr + slot)
        if tl.load(num_outputs_ptr + slot) >= tl.load(min_tokens_ptr + slot):
            num_ends = 0
        repetition = tl.load(penalties_ptr + 3 * slot)
        frequency = tl.load(penalties_ptr + 3 * slot + 1)
        presence = tl.load(penalties_ptr + 3 * slot + 2)
        has_penalty = (repetition != 1.0) | (frequency != 0.0) | (presence != 0.0)
        if is_restricted | has_penalty | (num_bias + num_ends > 0):
            live = token < vocab
            x = tl.load(logits_ptr + row * logits_row + token, mask=live, other=0.0)
            if is_restricted:
                x = tl.where(_has_bit(allowed_ptr + slot * words_row, token, live), x, -_INF)
            for index in range(num_ends):
                x = tl.where(token == tl.load(end_ids_ptr + slot * ends_row + index), -_INF, x)
            for index in range(num_bias):
                bias = tl.load(bias_ptr + slot * bias_row + index)
                x = tl.where(token == tl.load(bias_ids_ptr + slot * bias_row + index), x + bias, x)
            if has_penalty:
                count = tl.load(counts_ptr + slot * vocab + token, mask=live, other=0)
                seen = (count > 0) | _has_bit(prompt_ptr + slot * words_row, token, live)
                repetitions = tl.zeros_like(x) + repetition
                penalised = tl.where(x > 0.0, tl.div_rn(x, repetitions), x * repetitions)
                penalised -= frequency * count.to(tl.float32)
                penalised -= presence * (count > 0).to(tl.float32)
                x = tl.where(seen, penalised, x)
            tl.store(logits_ptr + row * logits_row + token, x, mask=live)


@triton.jit(do_not_specialize=["num_rows"])
def _count_kernel(slots_ptr, tokens_ptr, counts_ptr, num_outputs_ptr, num_rows, vocab, BLOCK: tl.constexpr):
    row = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    slot = tl.load(slots_ptr + row, mask=row < num_rows, other=-1).to(tl.int64)
    token = tl.load(tokens_ptr + row, mask=row < num_rows, other=-1)
    live = (slot >= 0) & (token >= 0)
    tl.atomic_add(counts_ptr + slot * vocab + token, 1, mask=live, sem="relaxed")
    tl.atomic_add(num_outputs_ptr + slot, 1, mask=live, sem="relaxed")


def logits_lse(logits: Tensor, out: Tensor) -> None:
    """See `ops.logits_lse`."""
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    launch = stream_launch("lse", vocab)
    _lse_kernel[(num_rows,)](
        logits, out, logits.stride(0), vocab, BLOCK=launch.tiles["BLOCK"], num_warps=launch.num_warps
    )


def process_logits(logits: Tensor, slots: Tensor, tables: LogitsTables) -> None:
    """See `ops.process_logits`."""
    num_rows, vocab = logits.shape
    if num_rows == 0:
        return
    launch = stream_launch("logits", vocab)
    _process_kernel[(num_rows, triton.cdiv(vocab, launch.tiles["BLOCK"]))](
        logits,
        slots,
        tables.allowed,
        tables.prompt,
        tables.counts,
        tables.penalties,
        tables.bias_ids,
        tables.bias,
        tables.end_ids,
        tables.is_restricted,
        tables.num_bias,
        tables.num_ends,
        tables.min_tokens,
        tables.num_outputs,
        logits.stride(0),
        vocab,
        tables.allowed.stride(0),
        tables.bias.stride(0),
        tables.end_ids.stride(0),
        BLOCK=launch.tiles["BLOCK"],
        num_warps=launch.num_warps,
        enable_fp_fusion=False,
    )


def count_tokens(tables: LogitsTables, slots: Tensor, token_ids: Tensor) -> None:
    """See `ops.count_tokens`."""
    num_rows = slots.shape[0]
    if num_rows == 0:
        return
    block = _COUNT.tiles["BLOCK"]
    _count_kernel[(triton.cdiv(num_rows, block),)](
        slots,
        token_ids,
        tables.counts,
        tables.num_outputs,
        num_rows,
        tables.vocab,
        BLOCK=block,
        num_warps=_COUNT.num_warps,
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """One vocabulary; the same for every GPU."""
    launch = stream_launch("lse", 128256)
    yield CompileCase(
        name="logits/lse",
        kernel=_lse_kernel,
        types={"logits_ptr": "*fp32", "out_ptr": "*fp32", "logits_row": "i32", "vocab": "i32"},
        constants=dict(launch.tiles),
        launch=launch,
        uses={},
    )
    launch = stream_launch("logits", 128256)
    floats = ("logits_ptr", "penalties_ptr", "bias_ptr")
    numbers = ("logits_row", "vocab", "words_row", "bias_row", "ends_row")
    pointers = [name for name in _process_kernel.arg_names if name.endswith("_ptr")]
    yield CompileCase(
        name="logits/process",
        kernel=_process_kernel,
        types={name: "*fp32" if name in floats else "*i32" for name in pointers} | dict.fromkeys(numbers, "i32"),
        constants=dict(launch.tiles),
        launch=launch,
        uses={80: ("div.rn.f32",), 90: ("div.rn.f32",)},
        options={"enable_fp_fusion": False},
        absent=("fma.rn.f32",),
    )
    yield CompileCase(
        name="logits/count",
        kernel=_count_kernel,
        types={"slots_ptr": "*i32", "tokens_ptr": "*i64", "counts_ptr": "*i32", "num_outputs_ptr": "*i32"}
        | {"num_rows": "i32", "vocab": "i32"},
        constants=dict(_COUNT.tiles),
        launch=_COUNT,
        uses={},
    )
