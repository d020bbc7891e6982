"""The checksum finds what goes wrong in transit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from baton.kv_transfer.checksum import payload_checksum


def checksum_of(data: bytes | bytearray | np.ndarray) -> int:
    return payload_checksum(torch.from_numpy(np.frombuffer(bytes(data), dtype=np.uint8).copy()))


@given(data=st.binary(min_size=1, max_size=200), bit=st.integers(0, 1 << 30))
def test_one_flipped_bit_is_found(data: bytes, bit: int) -> None:
    damaged = bytearray(data)
    damaged[bit // 8 % len(data)] ^= 1 << bit % 8
    assert checksum_of(data) != checksum_of(damaged)


@given(data=st.binary(max_size=100), extra=st.integers(1, 20))
def test_appended_zeros_are_found(data: bytes, extra: int) -> None:
    assert checksum_of(data) != checksum_of(data + bytes(extra))


@pytest.mark.parametrize("num_bytes", [0, 1, 7, 8, 9, 4096, 100_003])
def test_fits_64_bits_and_depends_on_content_alone(num_bytes: int) -> None:
    data = np.random.default_rng(num_bytes).integers(0, 256, num_bytes + 3, dtype=np.uint8)
    shifted = data[3:]
    value = payload_checksum(torch.from_numpy(shifted))
    assert 0 <= value < 1 << 64
    assert value == checksum_of(shifted.tobytes())


def test_swapped_words_are_found() -> None:
    words = np.arange(1000, dtype=np.uint64)
    swapped = words.copy()
    swapped[[3, 700]] = words[[700, 3]]
    assert checksum_of(words) != checksum_of(swapped)


def test_known_values_do_not_change_between_versions() -> None:
    assert checksum_of(b"") == 0
    assert checksum_of(b"a" * 13) == 5847793549732600355
