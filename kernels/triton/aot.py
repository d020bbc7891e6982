"""Compile every Triton kernel ahead of time, without a GPU: `python -m baton.kernels.triton.aot 80 90`.

Prints one JSON object per case: registers per thread and how many bytes of them spill, shared memory, and
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
    "baton.kernels.triton.attention_cases",
    "baton.kernels.triton.checksum",
    "baton.kernels.triton.embedding",
    "baton.kernels.triton.logits",
    "baton.kernels.triton.noise",
    "baton.kernels.triton.norm",
    "baton.kernels.triton.pages",
    "baton.kernels.triton.rotary",
    "baton.kernels.triton.sampling",
)
"""Modules with `compile_cases`. Those of a new kernel are added here."""

_USAGE = re.compile(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)")
_TARGET = re.compile(r"^\.target (\w+)", re.MULTILINE)
_SPILLS = re.compile(r"(\d+) bytes spill (?:stores|loads)")


@dataclass(frozen=True, slots=True)
class Report:
    """What the compiler made of a case.

    Attributes:
        registers: per thread.
        spill_bytes: of registers that a thread stores to local memory and loads again.
        shared_bytes: shared memory per program, dynamic included.
        missing: instructions of `CompileCase.uses` that the PTX does not have.
        unwanted: those of `CompileCase.absent` that it has.
        spill_limit_bytes: of the case.
    """

    name: str
    capability: int
    num_warps: int
    registers: int
    spill_bytes: int
    shared_bytes: int
    missing: tuple[str, ...]
    unwanted: tuple[str, ...]
    spill_limit_bytes: int


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
    registers, spill_bytes = _resources(compiled.asm["ptx"], compiled.asm["cubin"])
    return Report(
        name=case.name,
        capability=capability,
        num_warps=case.launch.num_warps,
        registers=registers,
        spill_bytes=spill_bytes,
        shared_bytes=compiled.metadata.shared,
        missing=tuple(text for text in case.uses.get(capability, ()) if text not in compiled.asm["ptx"]),
        unwanted=tuple(text for text in case.absent if text in compiled.asm["ptx"]),
        spill_limit_bytes=case.spill_limit_bytes,
    )


def _resources(ptx: str, cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of spill stores and loads) per thread of the one kernel in a cubin."""
    with tempfile.TemporaryDirectory() as folder:
        binary, source = Path(folder, "kernel.cubin"), Path(folder, "kernel.ptx")
        binary.write_bytes(cubin)
        found = _USAGE.search(_run("cuobjdump", "--dump-resource-usage", binary))
        assert found is not None, "cuobjdump's words have changed"
        registers, stack_bytes, local_bytes = map(int, found.groups())
        if stack_bytes + local_bytes == 0:
            return registers, 0
        # A stack may also hold barriers' states, which cost nothing; only ptxas tells spilled registers apart.
        source.write_text(ptx, encoding="utf-8")
        target = _TARGET.search(ptx)
        assert target is not None, "PTX names its target"
        report = _run("ptxas", "-v", "--gpu-name", target.group(1), "-o", Path(folder, "again.cubin"), source)
        return registers, sum(map(int, _SPILLS.findall(report)))


def _run(tool: str, *arguments: str | Path) -> str:
    program = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    done = subprocess.run([program, *arguments], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout + done.stderr


def main(arguments: list[str]) -> None:
    if triton.knobs.runtime.interpret:
        sys.exit("TRITON_INTERPRET is set: unset it to compile")
    for capability in map(int, arguments):
        for case in cases(capability):
            print(json.dumps(asdict(compile_case(case, capability))), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
