"""Copies of whole blocks, and between pages and contiguous buffers, on a GPU; mirrors `reference/pages.py`.

Moves the widest words that sizes, strides and addresses allow. With a checksum, each word is summed as it passes, by
its place in the contiguous buffer, so both sides of a handover read their data once.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from baton.kernels.triton.checksum import finish_checksum
from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.mixing import GOLDEN, mix
from baton.kernels.triton.stream_launches import stream_launch

__all__ = ["block_copy", "compile_cases", "move_pages", "word_bytes"]

_WORDS = {8: torch.int64, 4: torch.int32, 2: torch.int16, 1: torch.uint8}


@triton.jit(do_not_specialize=["layer_begin", "token_begin", "num_tokens"])
def _move_kernel(
    pool_ptr,
    data_ptr,
    ids_ptr,
    sum_ptr,
    layer_begin,
    token_begin,
    num_tokens,
    pool_block,
    pool_layer,
    pool_pair,
    pool_head,
    pool_token,
    HEADS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROW_WORDS: tl.constexpr,
    TO_POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program: BLOCK words of one (layer, key or value, head) of the buffer."""
    page = tl.program_id(1)
    layer = (layer_begin + page // (2 * HEADS)).to(tl.int64)
    pair = (page // HEADS % 2).to(tl.int64)
    head = (page % HEADS).to(tl.int64)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    num_words = num_tokens * ROW_WORDS
    live = index < num_words
    token = token_begin + index // ROW_WORDS
    block = tl.load(ids_ptr + token // BLOCK_SIZE, mask=live, other=0).to(tl.int64)
    place = block * pool_block + layer * pool_layer + pair * pool_pair + head * pool_head
    place += (token % BLOCK_SIZE).to(tl.int64) * pool_token + index % ROW_WORDS
    at = page.to(tl.int64) * num_words + index
    if TO_POOL:
        word = tl.load(data_ptr + at, mask=live)
        tl.store(pool_ptr + place, word, mask=live)
    else:
        word = tl.load(pool_ptr + place, mask=live)
        tl.store(data_ptr + at, word, mask=live)
    if sum_ptr is not None:
        key = (at + 1).to(tl.uint64) * GOLDEN
        mixed = mix(word.to(tl.uint64, bitcast=True) ^ key).to(tl.int64, bitcast=True)
        tl.atomic_add(sum_ptr, tl.sum(tl.where(live, mixed, 0), 0), sem="relaxed")


@triton.jit
def _block_copy_kernel(pool_ptr, pairs_ptr, num_words, BLOCK: tl.constexpr):
    pair = tl.program_id(1)
    source = tl.load(pairs_ptr + 2 * pair) * num_words
    target = tl.load(pairs_ptr + 2 * pair + 1) * num_words
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    live = index < num_words
    tl.store(pool_ptr + target + index, tl.load(pool_ptr + source + index, mask=live), mask=live)


def word_bytes(kv: Tensor, data: Tensor) -> int:
    """The widest word, in bytes, that rows of both tensors begin and end with."""
    sizes = [size * tensor.element_size() for tensor in (kv, data) for size in _sizes(tensor)]
    return _widest(kv.data_ptr(), data.data_ptr(), *sizes)


def _sizes(tensor: Tensor) -> tuple[int, ...]:
    return (tensor.shape[-1], int(tensor.storage_offset()), *tensor.stride()[:-1])


def _widest(*sizes_bytes: int) -> int:
    return next(width for width in _WORDS if all(size % width == 0 for size in sizes_bytes))


def _on_device(ids: Tensor, device: torch.device) -> Tensor:
    return ids if ids.device == device else ids.to(device, non_blocking=True)


def move_pages(
    kv: Tensor,
    layer_begin: int,
    layer_end: int,
    block_ids: Tensor,
    token_begin: int,
    token_end: int,
    data: Tensor,
    *,
    to_pool: bool,
    sum_out: Tensor | None = None,
) -> None:
    """See `ops.gather_pages` and `ops.scatter_pages`.

    Args:
        sum_out: int64 [1], gets the bits of the checksum of `data`; rows must be whole 8-byte words then.
    """
    num_tokens = token_end - token_begin
    num_pages = (layer_end - layer_begin) * 2 * kv.shape[3]
    if sum_out is not None:
        sum_out.zero_()
    if data.numel():
        width = word_bytes(kv, data)
        assert sum_out is None or width == 8, f"a checksum on the way needs 8-byte words, these are of {width}"
        pool, words = kv.view(_WORDS[width]), data.view(_WORDS[width])
        launch = stream_launch("pages", num_tokens)
        block = launch.tiles["BLOCK"]
        row_words = words.shape[-1]
        _move_kernel[(triton.cdiv(num_tokens * row_words, block), num_pages)](
            pool,
            words,
            _on_device(block_ids, kv.device),
            sum_out,
            layer_begin,
            token_begin,
            num_tokens,
            *pool.stride()[:5],
            HEADS=kv.shape[3],
            BLOCK_SIZE=kv.shape[4],
            ROW_WORDS=row_words,
            TO_POOL=to_pool,
            BLOCK=block,
            num_warps=launch.num_warps,
        )
    if sum_out is not None:
        finish_checksum(sum_out, data.numel() * data.element_size())


def block_copy(kv: Tensor, pairs: Tensor) -> None:
    """See `ops.block_copy`."""
    num_pairs = pairs.shape[0]
    block_bytes = kv[0].numel() * kv.element_size() if kv.shape[0] else 0
    if num_pairs == 0 or block_bytes == 0:
        return
    # The rows of blocks are contiguous: only a block's size and the pool's address matter.
    width = _widest(kv.data_ptr(), int(kv.storage_offset()) * kv.element_size(), block_bytes)
    flat = kv.view(-1).view(_WORDS[width])
    launch = stream_launch("block_copy", block_bytes)
    num_words = block_bytes // width
    _block_copy_kernel[(triton.cdiv(num_words, launch.tiles["BLOCK"]), num_pairs)](
        flat, _on_device(pairs, kv.device), num_words, BLOCK=launch.tiles["BLOCK"], num_warps=launch.num_warps
    )


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """Both directions, with and without checksum, all words; the same for every GPU."""
    launch = stream_launch("pages", 1)
    numbers = ("layer_begin", "token_begin", "num_tokens")
    strides = ("pool_block", "pool_layer", "pool_pair", "pool_head", "pool_token")
    for to_pool in (False, True):
        for word, has_sum in (("i64", True), ("i64", False), ("i32", False), ("i16", False), ("u8", False)):
            pointers = {"pool_ptr": f"*{word}", "data_ptr": f"*{word}", "ids_ptr": "*i64"}
            constants = {"HEADS": 8, "BLOCK_SIZE": 16, "ROW_WORDS": 32, "TO_POOL": to_pool, **launch.tiles}
            yield CompileCase(
                name=f"pages/{'scatter' if to_pool else 'gather'}/{word}{'/sum' if has_sum else ''}",
                kernel=_move_kernel,
                types=pointers
                | dict.fromkeys((*numbers, *strides), "i32")
                | ({"pool_block": "i64"} | ({"sum_ptr": "*i64"} if has_sum else {})),
                constants=constants if has_sum else constants | {"sum_ptr": None},
                launch=launch,
                uses={80: ("ld.global.v2.b64",), 90: ("ld.global.v2.b64",)} if word == "i64" else {},
            )
    launch = stream_launch("block_copy", 1)
    yield CompileCase(
        name="pages/block_copy",
        kernel=_block_copy_kernel,
        types={"pool_ptr": "*i64", "pairs_ptr": "*i64", "num_words": "i32"},
        constants=dict(launch.tiles),
        launch=launch,
        uses={80: ("ld.global.v2.b64",), 90: ("ld.global.v2.b64",)},
    )
