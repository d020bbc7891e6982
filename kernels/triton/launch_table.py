"""How each Triton kernel is launched: tile sizes, warps and pipeline stages, measured or derived, checked in.

Pure data: no torch, no triton. A kernel's entries are keyed by (GPU, element type, shape bucket); a GPU is looked up by
its name, then by its compute capability, so an entry for one card overrides the one for its family. Nothing is tuned
on the request path: a shape without an entry is an error here, and a test compiles every entry ahead of time.

To add a kernel: put its entries into `TABLE` under the kernel's name, `"half"` standing for fp16 and bf16, and give
the kernel's module a `compile_cases` (see `compile_case.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["TABLE", "Bucket", "Key", "Launch", "find_launch", "gpus_for", "next_power_of_2"]

Bucket = tuple[int, ...]
"""Numbers that name a range of shapes; each kernel says which. Buckets match exactly."""
Key = tuple[str, str, Bucket]
"""(GPU name | "sm_90" | "sm_80" | "interpreter", "half" | "float32", bucket)."""

_FAMILIES = (90, 80)


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch configuration.

    Attributes:
        num_warps, num_stages: Triton's options of these names.
        tiles: the kernel's constexpr tile sizes by name, and what its wrapper needs to size the grid.
    """

    num_warps: int
    num_stages: int
    tiles: Mapping[str, int]

    @classmethod
    def of(cls, num_warps: int, num_stages: int, **tiles: int) -> Launch:
        return cls(num_warps, num_stages, MappingProxyType(tiles))


def next_power_of_2(value: int) -> int:
    """The least power of two that is no less than `value` >= 1."""
    return 1 << (value - 1).bit_length()


def gpus_for(name: str, capability: int) -> tuple[str, ...]:
    """The table's names of a GPU, most particular first, e.g. ("NVIDIA H200", "sm_90", "sm_80") for capability 90."""
    return (name, *(f"sm_{family}" for family in _FAMILIES if family <= capability))


def find_launch(kernel: str, gpus: Sequence[str], dtype: str, bucket: Bucket) -> Launch:
    """The entry of `kernel` for the first of `gpus` that has one.

    Args:
        dtype: "bfloat16", "float16", "half" or "float32".
    Raises:
        ValueError: there is none.
    """
    entries = TABLE[kernel]
    width = "float32" if dtype == "float32" else "half"
    for gpu in gpus:
        found = entries.get((gpu, width, bucket))
        if found is not None:
            return found
    raise ValueError(f"{kernel} has no launch configuration for {dtype}, bucket {bucket} on {' or '.join(gpus)}")


_HEAD_DIMS = (32, 64, 128, 256)


def _decode_attention() -> dict[Key, Launch]:
    """Bucket: (packed query rows of a tile, padded head_dim).

    Stages count two levels of loads, page ids and then keys and values: five keep two steps of keys in flight, seven
    three; 64 KiB at 64 keys of 128 bf16. PROGRAMS_PER_SM of them are resident.
    """
    table: dict[Key, Launch] = {}
    keys_half = {32: 128, 64: 64, 128: 64, 256: 32}
    stages_half = {32: 5, 64: 7, 128: 5, 256: 5}
    for head_dim in _HEAD_DIMS:
        for rows in (16, 32, 64, 128):
            bucket = (rows, head_dim)
            for dtype in ("half", "float32"):
                table["interpreter", dtype, bucket] = Launch.of(4, 1, BLOCK_N=32, PROGRAMS_PER_SM=1)
            many = rows == 128 or rows * head_dim >= 64 * 128
            keys = keys_half[head_dim]
            table["sm_80", "half", bucket] = Launch.of(8 if many else 4, 5, BLOCK_N=keys, PROGRAMS_PER_SM=1)
            table["sm_90", "half", bucket] = Launch.of(
                8 if many else 4, stages_half[head_dim], BLOCK_N=keys, PROGRAMS_PER_SM=1 if many else 2
            )
            warps = 16 if rows * head_dim >= 128 * 256 else 8
            table["sm_80", "float32", bucket] = Launch.of(warps, 1, BLOCK_N=16, PROGRAMS_PER_SM=1)
    return table


def _fixed_attention() -> dict[Key, Launch]:
    """Bucket: (packed query rows of a tile, padded head_dim). BLOCK_N and SPLIT are part of the result's bits."""
    table: dict[Key, Launch] = {}
    for head_dim in _HEAD_DIMS:
        for rows in (64, 128):
            bucket = (rows, head_dim)
            for dtype in ("half", "float32"):
                table["interpreter", dtype, bucket] = Launch.of(4, 1, BLOCK_N=32, SPLIT=64, PROGRAMS_PER_SM=1)
            many = rows == 128 or head_dim >= 128
            keys = 64 if rows * head_dim < 128 * 128 else 32
            table["sm_80", "half", bucket] = Launch.of(8 if many else 4, 2, BLOCK_N=keys, SPLIT=512, PROGRAMS_PER_SM=1)
            stages = 5 if head_dim < 256 else 2
            table["sm_90", "half", bucket] = Launch.of(
                8 if many else 4, stages, BLOCK_N=keys, SPLIT=512, PROGRAMS_PER_SM=1
            )
            warps = 16 if rows * head_dim >= 128 * 256 else 8
            table["sm_80", "float32", bucket] = Launch.of(warps, 1, BLOCK_N=16, SPLIT=512, PROGRAMS_PER_SM=1)
    return table


def _prefill_attention() -> dict[Key, Launch]:
    """Bucket: (padded head_dim, 1 where keys come through tensor descriptors and 0 where through pointers)."""
    table: dict[Key, Launch] = {}
    for head_dim in _HEAD_DIMS:
        for dtype in ("half", "float32"):
            for descriptors in (0, 1):
                table["interpreter", dtype, (head_dim, descriptors)] = Launch.of(4, 1, BLOCK_M=32, BLOCK_N=32)
        table["sm_80", "float32", (head_dim, 0)] = Launch.of(8, 1, BLOCK_M=32, BLOCK_N=16)
    table["sm_90", "half", (32, 0)] = Launch.of(8, 5, BLOCK_M=128, BLOCK_N=128)
    table["sm_90", "half", (64, 0)] = Launch.of(8, 5, BLOCK_M=128, BLOCK_N=128)
    table["sm_90", "half", (128, 0)] = Launch.of(8, 5, BLOCK_M=128, BLOCK_N=64)
    table["sm_90", "half", (256, 0)] = Launch.of(8, 3, BLOCK_M=128, BLOCK_N=32)
    table["sm_90", "half", (64, 1)] = Launch.of(8, 3, BLOCK_M=128, BLOCK_N=64)
    table["sm_90", "half", (128, 1)] = Launch.of(8, 3, BLOCK_M=128, BLOCK_N=64)
    table["sm_80", "half", (32, 0)] = Launch.of(4, 3, BLOCK_M=64, BLOCK_N=64)
    table["sm_80", "half", (64, 0)] = Launch.of(8, 4, BLOCK_M=128, BLOCK_N=64)
    table["sm_80", "half", (128, 0)] = Launch.of(8, 3, BLOCK_M=128, BLOCK_N=32)
    table["sm_80", "half", (256, 0)] = Launch.of(8, 3, BLOCK_M=64, BLOCK_N=32)
    return table


TABLE: Mapping[str, Mapping[Key, Launch]] = {
    "decode_attention": _decode_attention(),
    "fixed_attention": _fixed_attention(),
    "prefill_attention": _prefill_attention(),
}
