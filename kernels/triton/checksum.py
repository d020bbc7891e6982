"""Checksum of bytes on a GPU, equal to `reference/checksum.py`.

A sum modulo 2^64 over words, so programs add theirs to one number in any order; a last kernel of one program finishes.
Nothing is read back: the result stays on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.launch_table import Launch
from baton.kernels.triton.mixing import GOLDEN, mix
from baton.kernels.triton.stream_launches import stream_launch

__all__ = ["checksum", "compile_cases", "finish_checksum"]

_ONE = Launch.of(1, 1)


@triton.jit(do_not_specialize=["num_words"])
def _sum_words_kernel(words_ptr, sum_ptr, num_words, BLOCK: tl.constexpr):
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < num_words
    # Only the last program needs the mask, which would keep the others from loading several words at once.
    if (tl.program_id(0).to(tl.int64) + 1) * BLOCK <= num_words:
        word = tl.load(words_ptr + index)
    else:
        word = tl.load(words_ptr + index, mask=live, other=0)
    word = word.to(tl.uint64, bitcast=True)
    mixed = tl.where(live, mix(word ^ ((index + 1).to(tl.uint64) * GOLDEN)).to(tl.int64, bitcast=True), 0)
    tl.atomic_add(sum_ptr, tl.sum(mixed, 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_bytes"])
def _sum_bytes_kernel(bytes_ptr, sum_ptr, num_bytes, BLOCK: tl.constexpr):
    """The same, where data are not aligned or no whole words; the last word is padded with zeros."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    word = tl.zeros([BLOCK], dtype=tl.uint64)
    for byte in tl.static_range(8):
        at = index * 8 + byte
        word |= tl.load(bytes_ptr + at, mask=at < num_bytes, other=0).to(tl.uint64) << (8 * byte)
    mixed = mix(word ^ ((index + 1).to(tl.uint64) * GOLDEN)).to(tl.int64, bitcast=True)
    tl.atomic_add(sum_ptr, tl.sum(tl.where(index * 8 < num_bytes, mixed, 0), 0), sem="relaxed")


@triton.jit(do_not_specialize=["num_bytes"])
def _finish_kernel(sum_ptr, num_bytes):
    total = tl.load(sum_ptr).to(tl.uint64, bitcast=True)
    tl.store(sum_ptr, mix(mix(total) ^ num_bytes.to(tl.uint64)).to(tl.int64, bitcast=True))


def finish_checksum(total: Tensor, num_bytes: int) -> None:
    """Turn the sum over all words in `total` int64 [1] into the checksum of `num_bytes` bytes, in place."""
    _finish_kernel[(1,)](total, num_bytes, num_warps=_ONE.num_warps)


def checksum(data: Tensor, out: Tensor) -> None:
    """Write the checksum of `data` uint8 [N], contiguous, to `out` int64 [1], its bits."""
    out.zero_()
    num_bytes = data.numel()
    if num_bytes:
        launch = stream_launch("checksum", num_bytes)
        block = launch.tiles["BLOCK"]
        grid = (triton.cdiv(num_bytes, 8 * block),)
        if num_bytes % 8 == 0 and data.data_ptr() % 8 == 0 and data.storage_offset() % 8 == 0:
            words = data.view(torch.int64)
            _sum_words_kernel[grid](words, out, num_bytes // 8, BLOCK=block, num_warps=launch.num_warps)
        else:
            _sum_bytes_kernel[grid](data, out, num_bytes, BLOCK=block, num_warps=launch.num_warps)
    finish_checksum(out, num_bytes)


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """Aligned, unaligned, and the end; the same for every GPU."""
    launch = stream_launch("checksum", 1)
    for number in ("i32", "i64"):
        types = {"words_ptr": "*i64", "sum_ptr": "*i64", "num_words": number}
        yield CompileCase(
            name=f"checksum/words/{number}",
            kernel=_sum_words_kernel,
            types=types,
            constants=dict(launch.tiles),
            launch=launch,
            uses={},
        )
        types = {"bytes_ptr": "*u8", "sum_ptr": "*i64", "num_bytes": number}
        yield CompileCase(
            name=f"checksum/bytes/{number}",
            kernel=_sum_bytes_kernel,
            types=types,
            constants=dict(launch.tiles),
            launch=launch,
            uses={},
        )
        yield CompileCase(
            name=f"checksum/finish/{number}",
            kernel=_finish_kernel,
            types={"sum_ptr": "*i64", "num_bytes": number},
            constants={},
            launch=_ONE,
            uses={},
        )
