"""Compile every Triton kernel ahead of time, without a GPU: `python -m baton.kernels.triton.aot 80 90`.

Prints one JSON object per case: registers per thread, stack bytes (spilled registers lie there), shared memory and
which of the expected instructions the PTX lacks. Needs no GPU: ptxas and cuobjdump come inside triton. It must not run
under TRITON_INTERPRET, where kernels and Triton's own library are Python functions that cannot be compiled.
"""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from baton.kernels.triton.compile_case import CompileCase
from baton.kernels.triton.launch_table import gpus_for

__all__ = ["MODULES", "Report", "cases", "compile_case"]

MODULES = (
    "baton.kernels.triton.activation",
    "baton.kernels.triton.checksum",
    "baton.kernels.triton.decode_attention",
    "baton.kernels.triton.decode_work",
    "baton.kernels.triton.embedding",
    "baton.kernels.triton.logits",
    "baton.kernels.triton.noise",
    "baton.kernels.triton.norm",
    "baton.kernels.triton.pages",
    "baton.kernels.triton.prefill_attention",
    "baton.kernels.triton.rotary",
    "baton.kernels.triton.sampling",
)
"""Modules with `compile_cases`. A new kernel's module is added here."""

SHARED_LIMIT_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Shared memory that one program may have."""

_RESOURCES = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of a case.

    Attributes:
        registers: per thread.
        stack_bytes: local memory per thread; 0 where nothing spills.
        shared_bytes: shared memory per program, dynamic included.
        missing: instructions of `CompileCase.uses` that the PTX does not have.
        unwanted: those of `CompileCase.absent` that it has.
        may_spill: `CompileCase.spills`.
    """

    name: str
    capability: int
    num_warps: int
    registers: int
    stack_bytes: int
    shared_bytes: int
    missing: tuple[str, ...]
    unwanted: tuple[str, ...]
    may_spill: bool


def cases(capability: int) -> Iterator[CompileCase]:
    """Every case of every module for a GPU of that compute capability."""
    for module in MODULES:
        yield from importlib.import_module(module).compile_cases(gpus_for("", capability))


def compile_case(case: CompileCase, capability: int) -> Report:
    """Compile to machine code and read its resource usage.

    Raises:
        triton.CompilationError, triton.runtime.errors.PTXASError: it does not compile.
    """
    kernel = case.kernel
    unspecialized = {parameter.name for parameter in kernel.params if parameter.do_not_specialize}
    signature = {name: case.types.get(name, "constexpr") for name in kernel.arg_names}
    divisible = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, type_name) in enumerate(signature.items())
        if name not in unspecialized and (type_name.startswith("*") or type_name in ("i32", "i64"))
    }
    source = ASTSource(kernel, signature, constexprs=dict(case.constants), attrs=divisible)
    options = {"num_warps": case.launch.num_warps, "num_stages": case.launch.num_stages, **case.options}
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    registers, stack_bytes = _resources(compiled.asm["cubin"])
    return Report(
        name=case.name,
        capability=capability,
        num_warps=case.launch.num_warps,
        registers=registers,
        stack_bytes=stack_bytes,
        shared_bytes=compiled.metadata.shared,
        missing=tuple(text for text in case.uses.get(capability, ()) if text not in compiled.asm["ptx"]),
        unwanted=tuple(text for text in case.absent if text in compiled.asm["ptx"]),
        may_spill=case.spills,
    )


def _resources(cubin: bytes) -> tuple[int, int]:
    """(registers, stack and local bytes) of the one kernel in a cubin."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
        text = subprocess.run(
            [tool, "--dump-resource-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        ).stdout
    found = _RESOURCES.search(text)
    assert found is not None, text
    registers, stack_bytes, local_bytes = map(int, found.groups())
    return registers, stack_bytes + local_bytes


def main(arguments: list[str]) -> None:
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    for capability in map(int, arguments):
        for case in cases(capability):
            print(json.dumps(asdict(compile_case(case, capability))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
