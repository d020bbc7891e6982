"""What is compiled ahead of time of paged attention: every entry of the launch table, and the odd shapes.

Shapes are those of an 8B model with 8 KV heads of 4 query heads each, in pages of 16 tokens where nothing else is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from baton.kernels.triton.attention_tile import padded_head_dim
from baton.kernels.triton.compile_case import TYPE_NAMES, CompileCase
from baton.kernels.triton.decode_attention import MERGE
from baton.kernels.triton.decode_kernels import attend_kernel, merge_kernel
from baton.kernels.triton.decode_work import PLAN, RECORD, TILES_PER_STEP, plan_kernel
from baton.kernels.triton.launch_table import TABLE, Launch, find_launch
from baton.kernels.triton.prefill_attention import prefill_kernel

__all__ = ["compile_cases"]

_STRIDES = (
    "q_stride_row",
    "q_stride_head",
    "out_stride_row",
    "out_stride_head",
    "stride_block",
    "stride_pair",
    "stride_head",
    "stride_token",
)


def compile_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    """See `compile_case.py`."""
    for table in ("decode_attention", "fixed_attention"):
        yield from _decode_cases(table, gpus)
    yield from _prefill_cases(gpus)
    for fixed in (False, True):
        yield _plan_case(f"decode_work/{'fixed' if fixed else 'shared'}", fixed=fixed)


def _decode_cases(table: str, gpus: Sequence[str]) -> Iterator[CompileCase]:
    fixed = table == "fixed_attention"
    buckets = sorted({bucket for gpu, _, bucket in TABLE[table] if gpu != "interpreter"})
    for dtype in ("bfloat16", "float32"):
        for rows, block_d in buckets:
            launch = find_launch(table, gpus, dtype, (rows, block_d))
            yield _attend_case(f"{table}/{dtype}/m{rows}/d{block_d}", dtype, block_d, rows, launch, fixed=fixed)
    launch = find_launch(table, gpus, "float16", (64, 128))
    yield _attend_case(f"{table}/float16/m64/d80", "float16", 80, 64, launch, fixed=fixed)
    yield _attend_case(
        f"{table}/bfloat16/m64/d128/window", "bfloat16", 128, 64, launch, fixed=fixed, window=True, block_size=64
    )
    yield _merge_case(f"{table}/merge", fixed=fixed)


def _attend_case(
    name: str,
    dtype: str,
    head_dim: int,
    rows: int,
    launch: Launch,
    *,
    fixed: bool,
    window: bool = False,
    block_size: int = 16,
) -> CompileCase:
    lists = ("tables_ptr", "starts_ptr", "tiles_ptr", "programs_ptr", "header_ptr")
    numbers = ("total_rows", "num_sequences", "window", "table_stride", *_STRIDES)
    return CompileCase(
        name=name,
        kernel=attend_kernel,
        types={
            **dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), "*" + TYPE_NAMES[dtype]),
            **dict.fromkeys(lists, "*i32"),
            **dict.fromkeys(("acc_ptr", "stats_ptr"), "*fp32"),
            **dict.fromkeys(numbers, "i32"),
            "scale_log2": "fp32",
        },
        constants={
            "NUM_KV_HEADS": 8,
            "GROUP": min(4, rows),
            "HEAD_DIM": head_dim,
            "BLOCK_D": padded_head_dim(head_dim),
            "BLOCK_SIZE": block_size,
            "BLOCK_M": rows,
            "BLOCK_N": launch.tiles["BLOCK_N"],
            "UNIT_TOKENS": launch.tiles["SPLIT"] if fixed else launch.tiles["BLOCK_N"],
            "RECORD_SIZE": RECORD,
            "FIXED": fixed,
            "HAS_WINDOW": window,
            "UPCAST": False,
        },
        launch=launch,
        uses={90: ("wgmma.mma_async",)} if fixed and dtype != "float32" else {},
        spill_limit_bytes=_spill_limit_bytes(head_dim, rows, dtype, fixed=fixed),
    )


def _spill_limit_bytes(head_dim: int, rows: int, dtype: str, *, fixed: bool) -> int:
    """More than 64 query heads per KV head and wide heads are rare; so are fixed splits of 256-wide heads or fp32."""
    if rows == 128 and head_dim >= (128 if fixed or dtype == "float32" else 256):
        return 4096
    return 512 if fixed and (head_dim == 256 or dtype == "float32") else 0


def _merge_case(name: str, *, fixed: bool) -> CompileCase:
    return CompileCase(
        name=name,
        kernel=merge_kernel,
        types={
            "out_ptr": "*bf16",
            **dict.fromkeys(("tiles_ptr", "programs_ptr", "header_ptr"), "*i32"),
            **dict.fromkeys(("acc_ptr", "stats_ptr"), "*fp32"),
            **dict.fromkeys(("out_stride_row", "out_stride_head"), "i32"),
        },
        constants={
            "NUM_KV_HEADS": 8,
            "GROUP": 4,
            "HEAD_DIM": 128,
            "BLOCK_D": 128,
            "BLOCK_M": 64 if fixed else 16,
            "PIECES": MERGE.tiles["PIECES"],
            "STAGES": MERGE.tiles["STAGES"],
            "RECORD_SIZE": RECORD,
            "FIXED": fixed,
        },
        launch=MERGE,
        uses={},
    )


def _prefill_cases(gpus: Sequence[str]) -> Iterator[CompileCase]:
    names = {name for name in gpus if name}
    present = {
        (width, bucket) for gpu, width, bucket in TABLE["prefill_attention"] if gpu in names and gpu != "interpreter"
    }
    for width, (block_d, described) in sorted(present):
        for dtype in ("float32",) if width == "float32" else ("bfloat16",):
            launch = find_launch("prefill_attention", gpus, dtype, (block_d, described))
            kind = "tma" if described else "pointers"
            yield _prefill_case(
                f"prefill_attention/{dtype}/d{block_d}/{kind}", dtype, block_d, launch, bool(described), False
            )
    launch = find_launch("prefill_attention", gpus, "float16", (128, 0))
    yield _prefill_case("prefill_attention/float16/d80/pointers/window", "float16", 80, launch, False, True)


def _prefill_case(name: str, dtype: str, head_dim: int, launch: Launch, described: bool, window: bool) -> CompileCase:
    lists = ("tables_ptr", "starts_ptr", "contexts_ptr")
    numbers = ("total_rows", "num_sequences", "search_steps", "fewest_rows", "window", "table_stride", *_STRIDES)
    element = TYPE_NAMES[dtype]
    block_n = launch.tiles["BLOCK_N"]
    types = {
        **dict.fromkeys(("q_ptr", "kv_ptr", "out_ptr"), "*" + element),
        **dict.fromkeys(lists, "*i32"),
        **dict.fromkeys(numbers, "i32"),
        "scale_log2": "fp32",
    }
    constants: dict[str, Any] = {
        "GROUP": 4,
        "HEAD_DIM": head_dim,
        "BLOCK_D": padded_head_dim(head_dim),
        "BLOCK_SIZE": 64 if described else 16,
        "BLOCK_M": launch.tiles["BLOCK_M"],
        "BLOCK_N": block_n,
        "DESCRIPTORS": described,
        "HAS_WINDOW": window,
        "UPCAST": False,
    }
    if described:
        types["kv_descriptor"] = f"tensordesc<{element}[1, 1, 1, {block_n}, {head_dim}]>"
    else:
        constants["kv_descriptor"] = None
    hopper = ("wgmma.mma_async", "cp.async.bulk.tensor") if described else ("wgmma.mma_async",)
    uses = {} if dtype == "float32" else {90: hopper}
    return CompileCase(name=name, kernel=prefill_kernel, types=types, constants=constants, launch=launch, uses=uses)


def _plan_case(name: str, *, fixed: bool) -> CompileCase:
    pointers = ("starts_ptr", "contexts_ptr", "tiles_ptr", "programs_ptr", "header_ptr")
    constants = {
        "NUM_KV_HEADS": 8,
        "TILE_TOKENS": 4,
        "UNIT_TOKENS": 512 if fixed else 64,
        "HAS_WINDOW": True,
        "FIXED": fixed,
        "RECORD_SIZE": RECORD,
        "BLOCK": TILES_PER_STEP,
    }
    numbers = [argument for argument in plan_kernel.arg_names if argument not in (*pointers, *constants)]
    return CompileCase(
        name=name,
        kernel=plan_kernel,
        types={**dict.fromkeys(pointers, "*i32"), **dict.fromkeys(numbers, "i32")},
        constants=constants,
        launch=PLAN,
        uses={},
    )
