"""Logs say which request they speak of, for people and as JSON."""

from __future__ import annotations

import asyncio
import io
import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from baton.log import about, annotate, mark_task, request_context, setup_logging

_log = logging.getLogger("baton.test")


@pytest.fixture
def written(request: pytest.FixtureRequest) -> Iterator[io.StringIO]:
    """What is logged, in the format of the test's parameter, json where it has none."""
    root = logging.getLogger()
    before = root.handlers[:], root.level
    stream = io.StringIO()
    setup_logging(format=getattr(request, "param", "json"), instance_id="decode-0", stream=stream)
    yield stream
    root.handlers[:], root.level = before


def _lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_lines_have_the_fields_of_their_request(written: io.StringIO) -> None:
    _log.info("before")
    with request_context("abc", attempt=0):
        _log.info("inside %d", 1)
        annotate(attempt=1, trace_id="4bf9")
        _log.warning("later", extra=about("other", 7))
    annotate(attempt=2)
    _log.info("after")
    before, inside, later, after = _lines(written)
    assert set(before) == set(after) == {"time", "level", "logger", "instance", "message"}
    assert (inside["request_id"], inside["attempt"], inside["message"]) == ("abc", 0, "inside 1")
    assert (later["request_id"], later["attempt"], later["trace_id"]) == ("other", 7, "4bf9")
    assert {line["instance"] for line in _lines(written)} == {"decode-0"}


@pytest.mark.parametrize("written", ["human"], indirect=True)
def test_people_see_the_beginning_of_the_id(written: io.StringIO) -> None:
    with request_context("0123456789abcdef0123456789"):
        _log.info("hello")
    _log.info("bye")
    hello, bye = written.getvalue().splitlines()
    assert hello.endswith("decode-0 baton.test [0123456789abcdef]: hello")
    assert bye.endswith("decode-0 baton.test: bye")


async def test_tasks_of_a_request_belong_to_it(written: io.StringIO) -> None:
    async def child() -> None:
        _log.info("child")
        annotate(attempt=3)

    async def request(name: str) -> None:
        mark_task(name)
        await asyncio.create_task(child())
        _log.info("parent")

    await asyncio.gather(request("a"), request("b"))
    _log.info("outside")
    *inside, outside = _lines(written)
    assert sorted((line["request_id"], line["message"], line.get("attempt")) for line in inside) == [
        ("a", "child", None),
        ("a", "parent", 3),
        ("b", "child", None),
        ("b", "parent", 3),
    ]
    assert "request_id" not in outside


def test_a_failure_is_part_of_its_line(written: io.StringIO) -> None:
    try:
        raise ValueError("broken\nin two")
    except ValueError:
        _log.exception("it failed")
    (line,) = _lines(written)
    assert "broken\nin two" in line["exception"]
