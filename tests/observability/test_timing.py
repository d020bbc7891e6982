"""Where the time until the first token went: as arithmetic, and told by a whole cluster to its clients."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tests.observability.whole_cluster import whole_cluster

from baton.engine.request import Phases
from baton.router.timing import PHASES, Timing

SECONDS = st.floats(0, 1e4)


@given(
    st.builds(
        Timing,
        queue_s=SECONDS,
        route_s=SECONDS,
        ttft_s=SECONDS,
        phases=st.builds(Phases, **dict.fromkeys(Phases.__dataclass_fields__, SECONDS)),
    )
)
def test_what_no_phase_holds_is_other(timing: Timing) -> None:
    by_phase = timing.by_phase()
    assert tuple(by_phase) == PHASES
    assert min(by_phase.values()) >= 0
    del by_phase["first_step"]
    known = sum(by_phase.values()) - by_phase["other"]
    assert sum(by_phase.values()) == pytest.approx(max(timing.ttft_s, known))


def _check(timing: dict[str, Any]) -> None:
    parts = {name: seconds for name, seconds in timing.items() if name not in ("ttft_s", "first_step_s")}
    assert sum(parts.values()) == pytest.approx(timing["ttft_s"], abs=1e-4)
    for name in ("route_s", "prefill_s", "transfer_exposed_s", "attach_s", "first_step_s"):
        assert timing[name] > 0, name


async def test_clients_that_ask_are_told(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # One event loop serves all three: a step is to take longer than what holds that up.
    async with whole_cluster(monkeypatch, tmp_path, step_s=0.05) as cluster:
        usage = (await cluster.complete()).json()["usage"]["baton"]
        assert usage == {"prefill_instance": "prefill-0", "decode_instance": "decode-0"}
        # Other prompts: what is in a prefix cache is not handed over.
        asked = await cluster.complete(include_timing=True, cache_salt="a")
        _check(asked.json()["usage"]["baton"]["timing"])
        options = {"include_timing": True}
        streamed = await cluster.complete(stream=True, stream_options=options, cache_salt="b")
        *_, last, done = [line.removeprefix("data: ") for line in streamed.text.splitlines() if line]
        assert done == "[DONE]"
        _check(json.loads(last)["usage"]["baton"]["timing"])
        *others, final = await cluster.generate(include_timing=True, cache_salt="c")
        assert not any(message.HasField("timing") for message in others)
        _check({field.name: getattr(final.timing, field.name) for field in final.timing.DESCRIPTOR.fields})
        (unasked,) = [message for message in await cluster.generate() if message.finish_reason]
        assert not unasked.HasField("timing")

        page = (await cluster.http.get("/metrics")).text
        for phase in PHASES:
            assert f'baton_ttft_phase_seconds_count{{phase="{phase}",role="router"}} 5.0' in page
