"""A 64-bit checksum over a payload: damage in transit is found, forgery is not its business.

High half: CRC-32, which finds every burst of up to 32 bits. Low half: the sum of the payload's 64-bit words, folded.
Both are one call over the whole buffer that lets go of the interpreter lock, so an engine thread runs on meanwhile.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

__all__ = ["Checksum", "payload_checksum"]

# Of uint8, shape [num_bytes], contiguous, on CPU; both ends of a link must use the same one.
Checksum = Callable[[torch.Tensor], int]

_MASK64 = (1 << 64) - 1
_ODD64 = 0x9E3779B97F4A7C15


def payload_checksum(payload: torch.Tensor) -> int:
    """Checksum of uint8 [num_bytes], contiguous; any length, also none. Equal on every host."""
    data: npt.NDArray[np.uint8] = payload.numpy()
    num_words = data.size // 8
    total = int(np.add.reduce(data[: num_words * 8].view("<u8"), dtype=np.uint64))
    total += int.from_bytes(data[num_words * 8 :].tobytes(), "little")
    mixed = ((total ^ data.size) * _ODD64) & _MASK64
    return (zlib.crc32(data.data) << 32) | ((mixed >> 32) ^ (mixed & 0xFFFFFFFF))
