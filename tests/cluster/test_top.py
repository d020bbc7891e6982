"""`baton top`: pages are read, counters become rates, and what is not known is not made up."""

from __future__ import annotations

import dataclasses
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.top.rows import Table, table_of
from baton.cluster.top.sample import Page, Reading, Sample, read_page
from baton.cluster.top.table_text import HEAD, bar, cells, plain_text
from baton.metrics import Metrics

PROMPT, WRITTEN = "baton_prompt_tokens_total", "baton_generation_tokens_total"
SENT = "baton_handover_bytes_total"
LOOKED_UP, HIT = "baton_prefix_cache_queries_tokens_total", "baton_prefix_cache_hit_tokens_total"
STEP_S, STEPS = "baton_step_seconds_sum", "baton_step_seconds_count"


def page(*, running: int = 0, waiting: int = 0, blocks: tuple[int, int, int] = (0, 0, 0), **counters: float) -> Page:
    names = ("free", "cached", "owned")
    return Page(running=running, waiting=waiting, kv_blocks=dict(zip(names, blocks, strict=True)), counters=counters)


def reading(name: str, of: Page | None = None, **fields: object) -> Reading:
    role = name.partition("-")[0]
    return Reading(instance_id=name, role=role, state="ready", incarnation="1", page=of, **fields)  # type: ignore[arg-type]


def between(before: Reading, after: Reading, seconds: float = 2.0) -> Table:
    return table_of(Sample(at_s=5.0, readings=(before,)), Sample(at_s=5.0 + seconds, readings=(after,)))


def test_our_own_pages_are_read() -> None:
    metrics = Metrics("decode")
    metrics.requests_running.set(3)
    metrics.requests_waiting.set(2)
    metrics.set_kv_blocks(free=5, cached=4, owned=1)
    for counter, value in (
        (metrics.prompt_tokens, 10),
        (metrics.generation_tokens, 20),
        (metrics.handover_bytes, 30),
        (metrics.prefix_cache_queries_tokens, 40),
        (metrics.prefix_cache_hit_tokens, 25),
    ):
        counter.inc(value)
    metrics.step_s.observe(0.5)
    metrics.step_s.observe(0.25)
    counters = {PROMPT: 10, WRITTEN: 20, SENT: 30, LOOKED_UP: 40, HIT: 25, STEP_S: 0.75, STEPS: 2}
    assert read_page(metrics.render().decode()) == page(running=3, waiting=2, blocks=(5, 4, 1), **counters)


def test_what_is_no_page_is_an_error() -> None:
    with pytest.raises(ValueError, match="html"):
        read_page("<html>busy</html>")
    assert read_page("").running == 0


def test_counters_become_rates() -> None:
    before = reading(
        "prefill-0", page(**{PROMPT: 100, WRITTEN: 1, SENT: 1e6, LOOKED_UP: 50, HIT: 50, STEP_S: 1, STEPS: 4})
    )
    counters = {PROMPT: 300, WRITTEN: 5, SENT: 5e6, LOOKED_UP: 250, HIT: 100, STEP_S: 1.5, STEPS: 14}
    after = reading("prefill-0", page(running=2, waiting=1, blocks=(6, 1, 3), **counters), slowness=1.25)
    (row,) = between(before, after).rows
    assert (row.running, row.waiting, row.kv_share) == (2, 1, 0.3)
    assert (row.prompt_tokens_s, row.generated_tokens_s, row.sent_bytes_s) == (100, 2, 2e6)
    assert (row.hit_share, row.step_s, row.slowness) == (0.25, 0.05, 1.25)


def test_hits_are_told_over_longer_and_else_since_the_start() -> None:
    old, mid, now = (reading("decode-0", page(**{LOOKED_UP: n, HIT: h})) for n, h in ((100, 90), (200, 90), (200, 90)))
    samples = [Sample(at_s=float(at), readings=(each,)) for at, each in enumerate((old, mid, now))]
    assert table_of(samples[1], samples[2], samples[0]).rows[0].hit_share == 0.0
    assert table_of(samples[1], samples[2]).rows[0].hit_share == 90 / 200


def test_a_process_started_anew_has_no_rates() -> None:
    before, after = reading("decode-0", page(**{WRITTEN: 100})), reading("decode-0", page(**{WRITTEN: 150}))
    assert between(before, after).rows[0].generated_tokens_s == 25
    assert between(before, dataclasses.replace(after, incarnation="2")).rows[0].generated_tokens_s is None
    assert between(after, before).rows[0].generated_tokens_s is None
    assert between(reading("decode-1", page()), after).rows[0].generated_tokens_s is None
    assert table_of(None, Sample(at_s=1.0, readings=(after,))).rows[0].generated_tokens_s is None


def test_who_does_not_answer_is_shown_as_such() -> None:
    silent = reading("decode-0", None, answered=False, running=4, waiting=2, kv_blocks={"free": 1, "owned": 1})
    table = between(silent, silent)
    assert "ready, no answer" in plain_text(table)
    (row,) = table.rows
    # Its last announcement is all there is.
    assert (row.running, row.waiting, row.kv_share, row.generated_tokens_s) == (4, 2, 0.5, None)


def test_the_total_counts_nothing_twice() -> None:
    now = (
        reading("decode-10", page(running=3, blocks=(10, 0, 10), **{WRITTEN: 40, PROMPT: 30})),
        reading("decode-9", page(running=2, blocks=(20, 0, 0), **{WRITTEN: 40})),
        reading("prefill-0", page(running=1, waiting=7, **{PROMPT: 30, SENT: 4e6, WRITTEN: 2})),
        reading("router-0", page(running=4, **{WRITTEN: 50, PROMPT: 30, LOOKED_UP: 30, HIT: 3})),
        reading("router-1", page(running=2, **{WRITTEN: 30})),
    )
    then = tuple(dataclasses.replace(each, page=page()) for each in now)
    table = table_of(Sample(at_s=0.0, readings=then), Sample(at_s=2.0, readings=now))
    assert [row.instance for row in table.rows] == ["router-0", "router-1", "prefill-0", "decode-9", "decode-10"]
    total = table.total
    assert (total.running, total.waiting, total.kv_share) == (6, 0, 0.25)
    assert (total.prompt_tokens_s, total.generated_tokens_s, total.sent_bytes_s, total.hit_share) == (15, 40, 2e6, 0.1)
    assert total.state == "5 of 5 ready"
    assert json.loads(json.dumps(table.as_dict()))["total"]["generated_tokens_s"] == 40


def test_the_plain_table() -> None:
    before = reading("decode-0", page(**{STEP_S: 0, STEPS: 0}))
    counters = {WRITTEN: 4000, PROMPT: 10, LOOKED_UP: 100, HIT: 37, STEP_S: 0.25, STEPS: 100}
    after = reading("decode-0", page(running=12, blocks=(2, 1, 1), **counters), slowness=5.0, health="ejected")
    text = plain_text(between(before, after))
    assert text.splitlines() == [
        "instance  state         queue  run   KV  prompt/s  tokens/s  sent MB/s  hits  step ms  slowness",
        "decode-0  ready             0   12  25%         5     2,000          -   37%      2.5       5.0  set aside",
        "all       1 of 1 ready      0    0  25%         -         -          -     -        -         -",
    ]


def test_what_routers_think_of_a_worker() -> None:
    one = reading("decode-0", page(), health="probing", is_stale=True)
    assert plain_text(between(one, one)).splitlines()[1].endswith("  on trial, cache unknown")


def test_an_empty_cluster_is_a_table_too() -> None:
    table = table_of(None, Sample(at_s=1.0))
    assert len(plain_text(table).splitlines()) == 2
    assert table.total.kv_share is None


@given(st.floats(-1, 2, allow_nan=False))
def test_bars_keep_their_width(share: float) -> None:
    assert len(bar(share)) == 8


def test_bars() -> None:
    assert [bar(0.0), bar(0.5), bar(1.0)] == [" " * 8, "████    ", "█" * 8]
    row = between(reading("decode-0", page()), reading("decode-0", page(blocks=(1, 0, 1)))).rows[0]
    assert cells(row, with_bar=True)[HEAD.index("KV")] == "████      50%"
