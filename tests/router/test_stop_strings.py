"""Stop strings against a naive search over the whole text, for every way of cutting it."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.router.stop_strings import StopChecker


def _naive(text: str, stops: list[str], include: bool) -> tuple[str, str | None]:
    for end in range(1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return (text[:end] if include else text[: end - len(longest)]), longest
    return text, None


alphabet = st.text("ab\n", max_size=24)


@given(st.lists(alphabet, max_size=8), st.lists(st.text("ab\n", min_size=1, max_size=5), max_size=4), st.booleans())
def test_equals_naive_search_for_any_cuts(pieces: list[str], stops: list[str], include: bool) -> None:
    checker = StopChecker(stops, include=include)
    out = ""
    for piece in pieces:
        out += checker.feed(piece)
        if checker.matched is not None:
            break
    else:
        out += checker.flush()
    assert (out, checker.matched) == _naive("".join(pieces), stops, include)


@given(alphabet, st.lists(st.text("ab\n", min_size=1, max_size=5), min_size=1, max_size=3))
def test_never_gives_out_what_may_begin_a_stop_string(text: str, stops: list[str]) -> None:
    checker = StopChecker(stops)
    out = ""
    for char in text:
        out += checker.feed(char)
        if checker.matched is not None:
            return
        held = text[len(out) :][: len(checker._held)]
        assert out + held == text[: len(out) + len(held)]
        assert not checker._held or any(stop.startswith(checker._held) for stop in stops)


def test_examples() -> None:
    checker = StopChecker(["STOP", "OP"])
    assert [checker.feed(piece) for piece in ("a S", "TO")] == ["a ", ""]
    assert checker.feed("P b") == ""
    assert checker.matched == "STOP"
    with pytest.raises(AssertionError):
        checker.feed("more")
    assert StopChecker([]).feed("anything") == "anything"
