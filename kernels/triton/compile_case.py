"""One kernel with one launch configuration, described so that it compiles without a GPU and without tensors.

A kernel's module, or one beside it, exposes `compile_cases(gpus) -> Iterator[CompileCase]`: one case for every entry of
the launch table that `gpus` (see `launch_table.gpus_for`) can choose. `aot.py` lists the modules and compiles all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from baton.kernels.triton.launch_table import Launch

__all__ = ["TYPE_NAMES", "CompileCase"]

TYPE_NAMES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}
"""Triton's names of torch's dtypes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CompileCase:
    """Attributes:
    name: readable and unique, "kernel/dtype/shape".
    kernel: what `@triton.jit` gave.
    types: Triton type of each run-time parameter by name: "*bf16", "i32", "fp32", "tensordesc<bf16[64, 128]>".
        Pointers and integers count as divisible by 16, as in use, unless the kernel says `do_not_specialize`.
    constants: value of each constexpr parameter by name, tiles included.
    launch: warps and stages.
    uses: instructions that the PTX must have, by capability, e.g. {90: ("wgmma",)}.
    options: more of Triton's options, as the wrapper launches it, e.g. {"enable_fp_fusion": False}.
    absent: texts that the PTX must not have, e.g. ("fma.rn.f64",).
    spill_limit_bytes: of registers per thread that may spill.
    """

    name: str
    kernel: Any
    types: Mapping[str, str]
    constants: Mapping[str, Any]
    launch: Launch
    uses: Mapping[int, tuple[str, ...]]
    options: Mapping[str, Any] = field(default_factory=dict)
    absent: tuple[str, ...] = ()
    spill_limit_bytes: int = 0
