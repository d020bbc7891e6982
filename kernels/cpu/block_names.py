"""Names of a prompt's blocks in C++, found and called without torch: the router, which has none, needs them most.

Any build of the library will do: the function itself asks what the processor can.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.machinery
from array import array
from collections.abc import Callable
from ctypes import c_char_p, c_int64, c_uint32, c_void_p
from pathlib import Path

__all__ = ["BlockNames", "load_block_names"]

_FOLDER = Path(__file__).parent.parent
_NAME_BYTES = 32

BlockNames = Callable[["array[int]", int, bytes | None, bytes], list[bytes]]
"""(ids as `array("I")`, block size, name before the first block, what stands behind the ids) -> names."""


@functools.cache
def load_block_names(*, is_portable: bool = False) -> BlockNames | None:
    """The function; None where no library is built, or one of older sources.

    Args:
        is_portable: as on a processor without instructions for SHA-256.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = _FOLDER / f"_cpu_generic{suffix}"
        if path.exists():
            try:
                return _bind(ctypes.CDLL(str(path)), is_portable)
            except (OSError, AttributeError):
                return None
    return None


def _bind(library: ctypes.CDLL, is_portable: bool) -> BlockNames:
    function = library.baton_block_names
    function.argtypes = (c_void_p, c_int64, c_uint32, c_char_p, c_char_p, c_int64, c_int64, c_char_p)
    function.restype = c_int64

    def names(ids: array[int], block_size: int, parent: bytes | None, tail: bytes) -> list[bytes]:
        assert ids.itemsize == 4, ids.itemsize
        num_blocks = len(ids) // block_size
        out = ctypes.create_string_buffer(num_blocks * _NAME_BYTES)
        failed = function(ids.buffer_info()[0], num_blocks, block_size, parent, tail, len(tail), is_portable, out)
        assert not failed, "no memory for one block"
        raw = out.raw
        return [raw[start : start + _NAME_BYTES] for start in range(0, len(raw), _NAME_BYTES)]

    return names
