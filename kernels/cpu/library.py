"""Finds, loads and calls the C++ kernels: one shared library per instruction set, a plain C interface, no Python.h.

`_cpu_avx512bf16`, `_cpu_avx512`, `_cpu_avx2` and `_cpu_generic` are built from the same sources by setup.py and lie
next to `ops.py`.
The best one that exists and that the processor can run is taken. Methods of `CpuLibrary` mirror the functions of
`reference/`; arguments were checked by `ops.py`, indices are checked by the library before anything is written.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
import logging
from ctypes import c_char_p, c_float, c_int64, c_uint64, c_void_p
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.kernels.packed_linear import NativeLinear, PackedLinear, Quantization, allocate
from baton.kernels.reference import linear as linear_reference

__all__ = ["CpuLibrary", "available", "load", "load_best"]

_log = logging.getLogger(__name__)

_ABI_VERSION = 6
_FOLDER = Path(__file__).parent.parent
_VARIANTS = {"AVX512": ("avx512", "avx2", "generic"), "AVX2": ("avx2", "generic")}
# What the build of this name needs besides AVX-512.
_BF16_FEATURES = ("avx512_bf16", "avx512_vnni", "avx512_vbmi")
_DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_FORMAT_CODES: dict[Quantization, int] = {"none": 0, "int8": 1, "int4": 2}


class _Rows(ctypes.Structure):
    """Strided rows [rows, heads, dim] with a dense last dimension; strides in elements."""

    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("head_stride", c_int64))


class _Pages(ctypes.Structure):
    """One layer of the pool [num_blocks, 2, heads, block_size, dim]; strides in elements."""

    _fields_ = (
        ("data", c_void_p),
        ("num_blocks", c_int64),
        ("num_heads", c_int64),
        ("block_size", c_int64),
        ("head_dim", c_int64),
        ("block_stride", c_int64),
        ("pair_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
    )


def _rows(x: Tensor) -> _Rows:
    return _Rows(x.data_ptr(), x.stride(0), x.stride(1) if x.dim() == 3 else 0)


def _pages(kv_layer: Tensor) -> _Pages:
    num_blocks, _, num_heads, block_size, head_dim = kv_layer.shape
    return _Pages(kv_layer.data_ptr(), num_blocks, num_heads, block_size, head_dim, *kv_layer.stride()[:4])


_I, _P = c_int64, c_void_p
_SIGNATURES: dict[str, tuple[object, ...]] = {
    "baton_rms_norm": (_I, _I, _I, _I, _Rows, _P, c_float, _Rows, _Rows),
    "baton_silu_mul": (_I, _I, _I, _P, _I, _P, _I),
    "baton_rope_and_cache": (_I, _I, _I, _Rows, _Rows, _Rows, _P, _P, _I, _I, _P, _Pages, _P, _I),
    "baton_paged_attention": (_I, _I, _I, _Rows, _Pages, _P, _I, _I, _I, _P, _P, c_float, _I, _Rows),
    "baton_logits_lse": (_I, _I, _P, _I, _P),
    "baton_gumbel_noise": (_I, _I, _P, _P, _P),
    "baton_draw_tokens": (_I, _I, _P, _I, _P, _P, _P, _P),
    "baton_block_copy": (_P, _I, _P, _I),
    "baton_move_pages": (_P, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _I, _P, _I, _I, _P, _I, _P),
    "baton_linear_packed_bytes": (_I, _I, _I, _I),
    "baton_linear_panel_columns": (),
    "baton_linear_pack": (_I, _I, _I, _I, _P, _I, _P),
    "baton_linear": (ctypes.POINTER(NativeLinear), _P, _I, _P, _I, _I),
    "baton_decoder_run": (_P, _P, _I, _I, _I),
    "baton_decoder_logits": (_P, _P, _P, _I, _P, _I, _P),
}


class CpuLibrary:
    """One loaded shared library."""

    def __init__(self, variant: str, path: Path) -> None:
        self.name = f"cpu-{variant}"
        self._lib = ctypes.CDLL(str(path))
        self._lib.baton_abi_version.restype = c_int64
        found = self._lib.baton_abi_version()
        if found != _ABI_VERSION:
            raise OSError(f"{path} has interface version {found}, this code needs {_ABI_VERSION}: build it again")
        self._lib.baton_error.restype = c_char_p
        self._lib.baton_set_num_threads.argtypes = (c_int64,)
        self._lib.baton_num_threads.restype = c_int64
        self._lib.baton_helped_items.restype = c_int64
        self._lib.baton_cores_attach.argtypes = (c_char_p, c_int64, c_int64)
        self._lib.baton_cores_attach.restype = c_int64
        self._lib.baton_cores_enter.restype = None
        self._lib.baton_cores_leave.restype = None
        self._lib.baton_checksum.argtypes = (c_void_p, c_int64)
        self._lib.baton_checksum.restype = c_uint64
        for name, argument_types in _SIGNATURES.items():
            function = getattr(self._lib, name)
            function.argtypes = argument_types
            function.restype = c_int64

    def _check(self, status: int) -> None:
        if status != 0:
            raise ValueError(self._lib.baton_error().decode())

    def set_num_threads(self, num_threads: int) -> None:
        self._lib.baton_set_num_threads(num_threads)

    def num_threads(self) -> int:
        return int(self._lib.baton_num_threads())

    def helped_items(self) -> int:
        """Pieces of work that helper threads have done."""
        return int(self._lib.baton_helped_items())

    def attach_cores(self, path: str | None, slot: int, max_threads: int) -> None:
        encoded = None if path is None else path.encode()
        self._check(self._lib.baton_cores_attach(encoded, slot, max_threads))

    def enter_cores(self) -> None:
        self._lib.baton_cores_enter()

    def leave_cores(self) -> None:
        self._lib.baton_cores_leave()

    def rms_norm(self, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None, out: Tensor) -> None:
        num_heads = x.shape[1] if x.dim() == 3 else 1
        residual_rows = _Rows(None, 0, 0) if residual is None else _rows(residual)
        if x.dim() == 2:
            x_rows = _Rows(x.data_ptr(), x.stride(0), 0)
            out_rows = _Rows(out.data_ptr(), out.stride(0), 0)
        else:
            x_rows, out_rows = _rows(x), _rows(out)
        self._check(
            self._lib.baton_rms_norm(
                _DTYPE_CODES[x.dtype],
                x.shape[0],
                num_heads,
                x.shape[-1],
                x_rows,
                weight.data_ptr(),
                eps,
                residual_rows,
                out_rows,
            )
        )

    def silu_mul(self, gate_up: Tensor, out: Tensor) -> None:
        self._check(
            self._lib.baton_silu_mul(
                _DTYPE_CODES[gate_up.dtype],
                out.shape[0],
                out.shape[1],
                gate_up.data_ptr(),
                gate_up.stride(0),
                out.data_ptr(),
                out.stride(0),
            )
        )

    def rope_and_cache(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        positions: Tensor,
        kv_layer: Tensor,
        slots: Tensor,
    ) -> None:
        self._check(
            self._lib.baton_rope_and_cache(
                _DTYPE_CODES[q.dtype],
                q.shape[0],
                q.shape[1],
                _rows(q),
                _rows(k),
                _rows(v),
                cos.data_ptr(),
                sin.data_ptr(),
                cos.shape[0],
                cos.shape[1],
                positions.data_ptr(),
                _pages(kv_layer),
                slots.data_ptr(),
                slots.element_size(),
            )
        )

    def paged_attention(
        self,
        q: Tensor,
        kv_layer: Tensor,
        block_tables: Tensor,
        query_start: Tensor,
        context_lens: Tensor,
        scale: float,
        sliding_window: int | None,
        out: Tensor,
    ) -> None:
        self._check(
            self._lib.baton_paged_attention(
                _DTYPE_CODES[q.dtype],
                q.shape[0],
                q.shape[1],
                _rows(q),
                _pages(kv_layer),
                block_tables.data_ptr(),
                block_tables.stride(0),
                block_tables.shape[1],
                context_lens.shape[0],
                query_start.data_ptr(),
                context_lens.data_ptr(),
                scale,
                sliding_window or 0,
                _rows(out),
            )
        )

    def logits_lse(self, logits: Tensor, out: Tensor) -> None:
        num_rows, vocab = logits.shape
        self._check(self._lib.baton_logits_lse(num_rows, vocab, logits.data_ptr(), logits.stride(0), out.data_ptr()))

    def gumbel_noise(self, seeds: Tensor, positions: Tensor, out: Tensor) -> None:
        num_rows, vocab = out.shape
        self._check(
            self._lib.baton_gumbel_noise(num_rows, vocab, seeds.data_ptr(), positions.data_ptr(), out.data_ptr())
        )

    def draw_tokens(
        self,
        logits: Tensor,
        row_ids: npt.NDArray[np.int64],
        samplings: bytes,
        positions: npt.NDArray[np.int64],
    ) -> npt.NDArray[np.int64]:
        tokens = np.empty(len(row_ids), dtype=np.int64)
        self._check(
            self._lib.baton_draw_tokens(
                len(row_ids),
                logits.shape[1],
                logits.data_ptr(),
                logits.stride(0),
                row_ids.ctypes.data,
                samplings,
                positions.ctypes.data,
                tokens.ctypes.data,
            )
        )
        return tokens

    def checksum(self, data: Tensor) -> int:
        return int(self._lib.baton_checksum(data.data_ptr(), data.numel()))

    def block_copy(self, kv: Tensor, pairs: Tensor) -> None:
        block_bytes = kv.stride(0) * kv.element_size()
        self._check(self._lib.baton_block_copy(kv.data_ptr(), block_bytes, pairs.data_ptr(), pairs.shape[0]))

    def move_pages(
        self,
        kv: Tensor,
        layer_begin: int,
        layer_end: int,
        block_ids: Tensor,
        token_begin: int,
        token_end: int,
        data: Tensor,
        *,
        to_pool: bool,
        with_checksum: bool = False,
    ) -> int:
        """Returns the checksum of `data` where it is asked for, else 0; it needs rows of whole words."""
        found = c_uint64(0)
        element_bytes = kv.element_size()
        strides = [stride * element_bytes for stride in kv.stride()[:5]]
        self._check(
            self._lib.baton_move_pages(
                kv.data_ptr(),
                kv.shape[0],
                *strides,
                kv.shape[3],
                kv.shape[4],
                kv.shape[5] * element_bytes,
                layer_begin,
                layer_end,
                block_ids.shape[0],
                block_ids.data_ptr(),
                token_begin,
                token_end,
                data.data_ptr(),
                int(to_pool),
                ctypes.byref(found) if with_checksum else None,
            )
        )
        return found.value

    def pack_linear(self, weight: Tensor, bias: Tensor | None, quantization: Quantization, group: int) -> PackedLinear:
        (n, k), dtype = weight.shape, _DTYPE_CODES[weight.dtype]
        scales, source = None, weight
        if quantization != "none":
            source, scales = linear_reference.quantize(weight, quantization, group)
            columns = int(self._lib.baton_linear_panel_columns())
            scales = torch.nn.functional.pad(scales, (0, 0, 0, -n % columns))
            scales = scales.unflatten(0, (-1, columns)).transpose(1, 2).contiguous()  # [panels, groups, columns]
        code = _FORMAT_CODES[quantization]
        packed = allocate(int(self._lib.baton_linear_packed_bytes(dtype, code, n, k)))
        self._check(
            self._lib.baton_linear_pack(dtype, code, n, k, source.data_ptr(), source.stride(0), packed.data_ptr())
        )
        return PackedLinear(
            out_features=n,
            in_features=k,
            dtype=weight.dtype,
            quantization=quantization,
            group=group,
            backend=self.name,
            weight=packed,
            scales=scales,
            bias=bias,
            native=NativeLinear(
                n,
                k,
                dtype,
                code,
                group,
                packed.data_ptr(),
                None if scales is None else scales.data_ptr(),
                None if bias is None else bias.data_ptr(),
            ),
        )

    def linear(self, x: Tensor, packed: PackedLinear, out: Tensor) -> None:
        assert packed.native is not None
        self._check(
            self._lib.baton_linear(packed.native, x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), x.shape[0])
        )

    def decoder_run(
        self, decoder: ctypes.Structure, step: ctypes.Structure, begin: int, end: int, *, finish: bool
    ) -> None:
        """See `kernels/decoder.py`, which lays the structures out."""
        self._check(
            self._lib.baton_decoder_run(ctypes.addressof(decoder), ctypes.addressof(step), begin, end, int(finish))
        )

    def decoder_logits(
        self,
        decoder: ctypes.Structure,
        final_norm: Tensor,
        head: PackedLinear,
        num_rows: int,
        narrow: Tensor,
        out: Tensor,
    ) -> None:
        assert head.native is not None
        self._check(
            self._lib.baton_decoder_logits(
                ctypes.addressof(decoder),
                final_norm.data_ptr(),
                ctypes.addressof(head.native),
                num_rows,
                narrow.data_ptr(),
                narrow.shape[0],
                out.data_ptr(),
            )
        )


def _variants() -> tuple[str, ...]:
    """Instruction sets that this processor can run, best first."""
    found = _VARIANTS.get(torch.backends.cpu.get_cpu_capability(), ("generic",))
    features = torch.cpu.get_capabilities()
    has_bf16 = "avx512" in found and all(features.get(name) for name in _BF16_FEATURES)
    return ("avx512bf16", *found) if has_bf16 else found


def _find(variant: str) -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _FOLDER / f"_cpu_{variant}{suffix}"
        if path.exists():
            return path
    return None


@functools.cache
def available() -> tuple[str, ...]:
    """Names of the libraries that are built and that this processor can run, best first."""
    return tuple(f"cpu-{variant}" for variant in _variants() if _find(variant) is not None)


@functools.cache
def load(name: str) -> CpuLibrary:
    """The library of backend `name`, such as "cpu-avx2".

    Raises:
        ValueError: it is unknown, not built, or not for this processor.
        OSError: the file is damaged or from another version of the sources.
    """
    variant = name.removeprefix("cpu-")
    path = _find(variant) if variant in _variants() else None
    if path is None:
        built = ", ".join(available()) or "none"
        raise ValueError(f"kernel backend {name!r} is not available here; available: {built}")
    return CpuLibrary(variant, path)


def load_best() -> CpuLibrary | None:
    """The best library, or None (with one warning) where none can be loaded."""
    reason = f"no _cpu_* library is built in {_FOLDER}"
    for name in available():
        try:
            return load(name)
        except OSError as error:
            reason = str(error)
    _log.warning(
        "CPU kernels are not available (%s): plain torch runs instead, slower and without bit-exact batching. "
        "Install a C++ compiler and reinstall Baton.",
        reason,
    )
    return None
