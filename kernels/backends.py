"""Which backend computes: chosen by the device of the tensors, and by name in tests.

    CUDA tensors   triton (where it can be imported), else reference
    CPU tensors    the C++ library, else reference; Triton's interpreter where a test asks for it
    other devices  reference

`BATON_KERNELS` names what CPU tensors run through, as `use_backend` does: "reference" means every device. Nothing here
imports Triton, which takes longer to load than all of our kernels; `checked/` does, at the first call that needs it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import os
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.kernels.cpu import library

__all__ = [
    "REFERENCE",
    "TRITON",
    "available_backends",
    "backend",
    "cpu_library",
    "library_for",
    "use_backend",
    "uses_triton",
]

REFERENCE = "reference"
TRITON = "triton"


@dataclass(frozen=True, slots=True)
class _Choice:
    """What runs now.

    Attributes:
        native: for CPU tensors; None: reference or interpreter.
        on_gpu: CUDA tensors go through Triton.
        interpreted: CPU tensors go through Triton's interpreter.
    """

    native: library.CpuLibrary | None
    on_gpu: bool
    interpreted: bool

    @property
    def name(self) -> str:
        if self.interpreted:
            return TRITON
        return REFERENCE if self.native is None else self.native.name


@functools.cache
def _has_triton() -> bool:
    return importlib.util.find_spec(TRITON) is not None


def _is_interpreting() -> bool:
    """Whether Triton's kernels run on CPU tensors: it reads this when the modules with the kernels are imported."""
    return _has_triton() and os.environ.get("TRITON_INTERPRET") == "1"


def _runs_triton() -> bool:
    return _is_interpreting() or (_has_triton() and torch.cuda.is_available())


def _choose(name: str) -> _Choice:
    if name == "auto":
        return _Choice(library.load_best(), _has_triton(), False)
    if name == REFERENCE:
        return _Choice(None, False, False)
    if name == TRITON:
        if not _runs_triton():
            raise ValueError(
                f"kernel backend {name!r} needs a GPU, or TRITON_INTERPRET=1 before Python starts; "
                f"available: {', '.join(available_backends())}"
            )
        interpreted = _is_interpreting()
        return _Choice(None if interpreted else library.load_best(), True, interpreted)
    return _Choice(library.load(name), _has_triton(), False)


_choice = _choose(os.environ.get("BATON_KERNELS", "auto"))


def backend() -> str:
    """Name of what runs for CPU tensors: "cpu-avx512bf16", "cpu-avx512", "cpu-avx2", "cpu-generic" or "reference".

    "triton" where its interpreter does.
    """
    return _choice.name


def available_backends() -> tuple[str, ...]:
    """Backends that run here: C++ libraries that are built, fastest first; "triton", on a GPU or in its interpreter.

    "reference" is the last.
    """
    return (*library.available(), *((TRITON,) if _runs_triton() else ()), REFERENCE)


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run through backend `name` inside the block, in every thread of the process. For tests.

    A C++ library takes CPU tensors only; "reference" takes all; "triton" takes CUDA tensors, and those on CPU where its
    interpreter is on.

    Raises:
        ValueError: the backend is not one of `available_backends()`.
    """
    global _choice
    previous = _choice
    chosen = _choose(name)
    if chosen.native is not None:
        chosen.native.set_num_threads(1 if previous.native is None else previous.native.num_threads())
    _choice = chosen
    try:
        yield
    finally:
        _choice = previous


def cpu_library() -> library.CpuLibrary | None:
    """The C++ library, where it is what runs for CPU tensors."""
    return _choice.native


def library_for(tensor: Tensor) -> library.CpuLibrary | None:
    """The C++ library, where it computes on tensors like this one."""
    return _choice.native if tensor.is_cpu else None


def uses_triton(tensor: Tensor) -> bool:
    """Whether Triton's kernels compute on tensors like this one."""
    return _choice.interpreted if tensor.is_cpu else _choice.on_gpu and tensor.is_cuda
