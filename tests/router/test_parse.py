"""JSON of clients: the quick parser says what the strict one says, or leaves it to that one."""

from __future__ import annotations

import json
import string
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from baton.errors import InvalidRequestError
from baton.router import limits
from baton.router.protocol import parse
from baton.router.protocol.parse import parse_json

_TEXT = st.text(string.ascii_letters + ':{}[]"\\\n\u00e9\ud7ff', max_size=8)
_LEAF = st.one_of(
    st.none(), st.booleans(), _TEXT, st.floats(allow_nan=False, allow_infinity=False), st.integers(-(2**63), 2**64 - 1)
)
_VALUES = st.recursive(
    _LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_TEXT, inner, max_size=4), max_leaves=12
)


def _outcome(read: Any, body: bytes) -> Any:
    try:
        return repr(read(body))  # 1, 1.0 and true are equal, and must not be taken for each other
    except InvalidRequestError as error:
        return error.message


@given(st.dictionaries(_TEXT, _VALUES, max_size=5), st.sampled_from((None, 1)), st.booleans())
def test_both_parsers_agree(value: dict[str, Any], indent: int | None, escapes: bool) -> None:
    body = json.dumps(value, indent=indent, ensure_ascii=escapes).encode()
    assert _outcome(parse_json, body) == _outcome(parse._parse_any, body)


@given(st.text('{}[]:,"\\ab01.eE-+ \t\u0000\u00e9', max_size=24))
@example('{"a":1,"a":2}')
@example('{"a":1,"\\u0061":2}')
@example('{"a":{"b":1},"a":{"c":1}}')
@example('{"a":[{"b":1,"b":2}],"c":":"}')
@example('{"a":{"b":1,"b":2}}')
@example('{"a":18446744073709551616}')
@example('{"a":-9223372036854775809}')
@example('{"a":1e400}')
@example('{"a":-0,"b":1E5,"c":01}')
@example('{"a":"\\ud83d"}')
@example("\ufeff{}")
@example("{" * 40)
def test_both_parsers_agree_on_anything(text: str) -> None:
    body = text.encode()
    assert _outcome(parse_json, body) == _outcome(parse._parse_any, body)


def test_token_ids_take_the_quick_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(parse, "_parse_any")
    value = {"prompt": list(range(4096)), "stream": True, "stream_options": {"include_usage": True}}
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize("excess", [0, 1])
def test_depth(excess: int) -> None:
    depth = limits.MAX_JSON_DEPTH + excess
    body = b'{"a":' + b"[" * (depth - 1) + b"]" * (depth - 1) + b"}"
    if excess:
        with pytest.raises(InvalidRequestError, match="deeper"):
            parse_json(body)
    else:
        assert parse_json(body)
