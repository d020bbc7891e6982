"""One line per generation in the router's log, and the timeline that it keeps of each."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from tests.router.harness import Harness, running_router

from baton.router import service as router_service
from baton.router.timelines import Timelines

PROMPT = list(range(20, 220))


def _lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, Any]]:
    return [
        {**record.fields, "text": record.getMessage()}  # type: ignore[attr-defined]
        for record in caplog.records
        if record.name == "baton.access"
    ]


async def _complete(router: Harness, **changes: Any) -> Any:
    body = {"model": "tiny", "prompt": PROMPT, "max_tokens": 4, **changes}
    return await router.post("/v1/completions", body, headers={"X-Request-Id": "mine"})


async def test_every_generation_has_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_router(tmp_path) as router:
        await _complete(router)
        await router.events("/v1/completions", {"model": "tiny", "prompt": PROMPT, "max_tokens": 3, "stream": True})
        assert (await _complete(router, max_tokens=-1)).status_code == 400
        router.decode.fail_with = "no more"
        assert (await _complete(router)).status_code == 500
        await router.http.get(f"{router.http_url}/livez")
    whole, streamed, refused, failed = _lines(caplog)
    assert whole["request_id"] == "mine"
    assert whole["route"] == "POST /v1/completions"
    assert (whole["status"], whole["outcome"]) == (200, "length")
    assert (whole["prompt_tokens"], whole["completion_tokens"], whole["cached_tokens"]) == (200, 4, 16)
    assert 0 < whole["ttft_s"] <= whole["duration_s"]
    assert whole["decode_instance"] == "decode-0"
    assert "200 (16 cached) + 4 tokens" in whole["text"]
    assert (streamed["status"], streamed["completion_tokens"]) == (200, 3)
    assert (refused["status"], "outcome" in refused) == (400, False)
    assert (failed["status"], failed["outcome"]) == (500, "error")
    assert "no more" in failed["error"]


async def test_the_lines_can_be_turned_off(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    async with running_router(tmp_path, log={"requests": False}) as router:
        await _complete(router)
    assert _lines(caplog) == []


async def test_a_request_that_moves_leaves_its_whole_way(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = Timelines(16)
    monkeypatch.setattr(router_service, "Timelines", lambda kept: store)
    async with running_router(tmp_path) as router:
        router.decode.break_after = 2
        assert (await _complete(router, max_tokens=5)).status_code == 200
        assert (await _complete(router, n=2)).status_code == 200
        router.decode.fail_with = "no more"
        await _complete(router)
    failed, *choices, moved = store.newest(10)
    assert (failed.outcome, failed.ttft_s) == ("error", None)
    assert "no more" in failed.error
    assert sorted(timeline.choice for timeline in choices) == [0, 1]
    assert (moved.request_id, moved.outcome, moved.completion_tokens) == ("mine", "length", 5)
    names = [(span.name, span.attempt) for span in moved.spans if span.name not in ("other", "reserve", "first_step")]
    assert names == [
        ("queue", 0),
        ("route", 0),
        ("attempt", 0),
        ("pause", 1),
        ("route", 1),
        ("attempt", 1),
        ("stream", 0),
    ]
    assert moved.duration_s is not None
    for span in moved.spans:
        assert span.start_s >= 0
        assert span.start_s + span.duration_s <= moved.duration_s + 1e-6
    assert {span.where for span in moved.spans if span.name == "attempt"} == {"decode-0"}
