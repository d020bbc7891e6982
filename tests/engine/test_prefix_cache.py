"""Block names are chained, salted and equal in every process."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import cbor2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine import prefix_cache
from baton.engine.prefix_cache import HashChain, block_hashes
from baton.kernels.cpu.block_names import load_block_names

WAYS = {
    "native": load_block_names,
    "native, portable": lambda: load_block_names(is_portable=True),
    "python": lambda: None,
}


@pytest.fixture(autouse=True, params=WAYS, scope="module")
def way(request: pytest.FixtureRequest) -> Iterator[str]:
    """Every test here holds whoever computes the names."""
    load = WAYS[request.param]
    if request.param != "python" and load() is None:
        pytest.skip("the C++ kernels are not built, or from older sources")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prefix_cache, "load_block_names", load)
        patch.setattr(prefix_cache, "_MIN_NATIVE_BLOCKS", 1)
        yield request.param


def test_names_are_golden() -> None:
    # sha256 of canonical CBOR 84 40 84 01 02 03 04 60 60: [b"", [1, 2, 3, 4], "", ""]

    expected = hashlib.sha256(bytes.fromhex("8440840102030460" + "60")).digest()
    assert block_hashes([1, 2, 3, 4, 5], 4) == [expected]


@given(
    st.lists(st.sampled_from((0, 1, 23, 24, 255, 256, 4095, 65535, 65536, 128_255, 2**32 - 1, 2**32)), max_size=700),
    st.sampled_from((1, 2, 16, 23, 24, 32, 255, 256, 300)),
    st.text(max_size=300),
    st.text(max_size=30),
)
def test_names_are_of_the_bytes_that_cbor2_writes(tokens: list[int], size: int, salt: str, adapter: str) -> None:
    expected: list[bytes] = []
    for begin in range(0, len(tokens) // size * size, size):
        parent = expected[-1] if expected else b""
        encoded = cbor2.dumps([parent, tokens[begin : begin + size], salt, adapter], canonical=True)
        expected.append(hashlib.sha256(encoded).digest())
    assert block_hashes(tokens, size, salt, adapter) == expected


def test_salt_and_adapter_keep_prefixes_apart() -> None:
    tokens = list(range(32))
    variants = {tuple(block_hashes(tokens, 16, salt, adapter)) for salt in ("", "a") for adapter in ("", "a", "b")}
    assert len(variants) == 6
    assert len({names[1] for names in variants}) == 6


@given(st.lists(st.integers(0, 5), max_size=40), st.lists(st.integers(0, 5), max_size=40), st.integers(1, 8))
def test_equal_names_mean_equal_prefixes(left: list[int], right: list[int], block_size: int) -> None:
    for index, (a, b) in enumerate(zip(block_hashes(left, block_size), block_hashes(right, block_size), strict=False)):
        end = (index + 1) * block_size
        assert (a == b) == (left[:end] == right[:end])


@given(st.lists(st.integers(0, 70000), max_size=60), st.integers(1, 8))
def test_a_growing_chain_names_as_a_fresh_one(tokens: list[int], block_size: int) -> None:
    chain = HashChain(block_size)
    for end in range(len(tokens) + 1):
        chain.names(tokens[:end])
    assert chain.names(tokens) == block_hashes(tokens, block_size)
