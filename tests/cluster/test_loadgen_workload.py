"""What a load consists of: prompts and their shared prefixes, traces, conversations, classes, limits."""

from __future__ import annotations

import json
from collections import Counter
from itertools import takewhile
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from baton.cluster.loadgen.lengths import Lengths
from baton.cluster.loadgen.load_class import LoadClass, parse_classes
from baton.cluster.loadgen.plan import Plan, Point, Sweep
from baton.cluster.loadgen.prompts import FIRST_TOKEN, Segment, TokenSource, cut, text_of
from baton.cluster.loadgen.sessions import SessionShape
from baton.cluster.loadgen.slo import Slo
from baton.cluster.loadgen.trace import BLOCK_TOKENS, TraceRow, read_trace, rescale, segments_of
from baton.cluster.loadgen.workload import Job, Workload
from baton.errors import ConfigError


def line(**values: Any) -> str:
    return json.dumps({"timestamp": 0, "input_length": 600, "output_length": 50, "hash_ids": [7, 8], **values})


def common(first: Any, second: Any) -> int:
    """How many leading items are equal."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))


def workload(**values: Any) -> Workload:
    defaults = {"requests": 20, "input": Lengths.parse("16", ""), "output": Lengths.parse("4", ""), "is_open": False}
    return Workload(**{**defaults, **values})


# Prompts


@given(length=st.integers(1, 300), longer=st.integers(1, 300), name=st.text(max_size=5))
@settings(deadline=None)
def test_a_name_stands_for_one_row_of_tokens(length: int, longer: int, name: str) -> None:
    source = TokenSource(seed="s", vocabulary=4000)
    ids = source.ids((Segment(name, length),))
    assert len(ids) == length
    assert ids.dtype == np.uint32
    assert ids.min() >= FIRST_TOKEN
    assert ids.max() < 4000
    assert np.array_equal(ids, TokenSource(seed="s", vocabulary=4000).ids((Segment(name, length + longer),))[:length])


def test_tokens_of_a_seed_stay_the_same_for_good() -> None:
    # Published seeds must give the same load with every version.
    assert TokenSource(seed="1/0", vocabulary=4000).ids((Segment("block 7", 6),)).tolist() == [
        1653,
        105,
        1947,
        1590,
        761,
        2404,
    ]
    assert text_of(np.array([100, 101, 102], dtype=np.uint32)).count(" ") == 2


def test_other_names_and_seeds_give_other_tokens() -> None:
    source = TokenSource(seed="1", vocabulary=4000)
    rows = [source.ids((Segment(name, 64),)) for name in ("a", "b")]
    rows.append(TokenSource(seed="2", vocabulary=4000).ids((Segment("a", 64),)))
    for index, row in enumerate(rows):
        assert all(common(row, other) < 4 for other in rows[:index])


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6), keep=st.integers(1, 300))
def test_cut_keeps_the_beginning(lengths: list[int], keep: int) -> None:
    segments = [Segment(str(index), length) for index, length in enumerate(lengths)]
    source = TokenSource(seed="s", vocabulary=4000)
    assert np.array_equal(source.ids(cut(segments, keep)), source.ids(segments)[:keep])


# Traces

ROWS = st.lists(st.integers(0, 6), min_size=1, max_size=6).flatmap(
    lambda ids: st.tuples(st.just(tuple(ids)), st.integers(1, BLOCK_TOKENS))
)


@given(first=ROWS, second=ROWS, scale=st.sampled_from([1.0, 0.5, 1 / 16, 0.1]))
@settings(deadline=None)
def test_prompts_share_exactly_the_blocks_that_their_hash_ids_share(first: Any, second: Any, scale: float) -> None:
    source = TokenSource(seed="s", vocabulary=4000)
    rows = [TraceRow(0.0, BLOCK_TOKENS * (len(ids) - 1) + last, 1, ids) for ids, last in (first, second)]
    prompts = [source.ids(segments_of(row, index, scale)) for index, row in enumerate(rows)]
    block = round(BLOCK_TOKENS * scale)
    shared_ids, shared_tokens = common(first[0], second[0]), common(*prompts)
    for (ids, last), prompt in zip((first, second), prompts, strict=True):
        assert len(prompt) == block * (len(ids) - 1) + min(block, max(1, round(last * scale)))
    # A last block may be a beginning of one: then all of the shorter prompt is shared.
    assert shared_tokens >= min(shared_ids * block, *(len(prompt) for prompt in prompts))
    if shared_ids < min(len(first[0]), len(second[0])):
        # Beyond them only chance is shared.
        assert shared_tokens < shared_ids * block + 8


def test_a_trace_is_read_in_the_order_of_its_times() -> None:
    rows = read_trace([line(timestamp=9000), line(timestamp=3000, input_length=512, hash_ids=[1])], name="t", limit=10)
    assert [(row.at_s, row.input_tokens, row.hash_ids) for row in rows] == [(0.0, 512, (1,)), (6.0, 600, (7, 8))]
    assert rescale(rows, rate_per_s=None, time_scale=0.5) == [0.0, 3.0]
    assert rescale(rows, rate_per_s=2.0, time_scale=0.5) == [0.0, 0.5]
    assert len(read_trace([line()] * 5, name="t", limit=3)) == 3


def test_a_trace_of_lengths_alone() -> None:
    text = ["TIMESTAMP,ContextTokens,GeneratedTokens\n", "2023-11-16 18:17:03.9799600,4808,10\n"]
    rows = read_trace([*text, "2023-11-16 18:17:04.0319600,3180,8\n"], name="t.csv", limit=10)
    assert [(round(row.at_s, 6), row.input_tokens, row.output_tokens) for row in rows] == [
        (0, 4808, 10),
        (0.052, 3180, 8),
    ]
    first, second = (segments_of(row, index, 0.125) for index, row in enumerate(rows))
    assert [segment.num_tokens for segment in (*first, *second)] == [601, 398]
    assert first[0].name != second[0].name


@pytest.mark.parametrize(
    "bad",
    ["{", "{}", line(hash_ids=[1]), line(input_length=0, hash_ids=[]), line(timestamp="x"), "TIMESTAMP\nx\n", "", "[]"],
)
def test_traces_that_are_refused_name_the_line(bad: str) -> None:
    with pytest.raises(ConfigError, match=r"mooncake"):
        read_trace(bad.splitlines(keepends=True), name="mooncake", limit=10)


# Workloads


def test_a_seed_gives_the_same_jobs_and_one_setting_leaves_the_others() -> None:
    lengths = {"input": Lengths.parse("10-900", ""), "output": Lengths.parse("1-50", "")}
    closed = workload(**lengths)
    opened = workload(**lengths, is_open=True, rate_per_s=5.0)
    assert list(closed.jobs("1")) == list(closed.jobs("1"))
    assert list(closed.jobs("1")) != list(closed.jobs("2"))
    assert [job.turns for job in closed.jobs("1")] == [job.turns for job in opened.jobs("1")]
    assert all(job.start_s is None for job in closed.jobs("1"))
    starts = [job.start_s for job in opened.jobs("1")]
    assert starts == sorted(starts)
    assert len(starts) == 20


def test_conversations_share_system_prompts_and_are_bounded_by_requests() -> None:
    shape = SessionShape.parse("turns=3,system_prompts=2,system_tokens=40,think_s=2")
    jobs = list(workload(sessions=shape, requests=50).jobs("1"))
    assert sum(len(job.turns) for job in jobs) == 50
    openings = Counter(job.turns[0].segments[0] for job in jobs)
    assert {segment.num_tokens for segment in openings} == {40}
    assert {segment.name for segment in openings} == {"system 0", "system 1"}
    assert all(len(turn.segments) == 1 and turn.think_s > 0 for job in jobs for turn in job.turns[1:])
    assert all(job.turns[0].think_s == 0 for job in jobs)
    said = [segment.name for job in jobs for turn in job.turns for segment in turn.segments[-1:]]
    assert len(set(said)) == 50


@given(window=st.integers(2, 400), asked=st.integers(1, 300), answered=st.integers(1, 300))
@settings(deadline=None)
def test_conversations_fit_into_the_window(window: int, asked: int, answered: int) -> None:
    shape = SessionShape(turns=3, system_prompts=1, system_tokens=20, think_s=0.0)
    lengths = {"input": Lengths.parse(str(asked), ""), "output": Lengths.parse(str(answered), "")}
    for job in workload(**lengths, sessions=shape, max_model_len=window, requests=6).jobs("1"):
        assert job.turns
        assert (
            sum(s.num_tokens for turn in job.turns for s in turn.segments)
            + sum(turn.output_tokens for turn in job.turns)
            <= window
        )
        assert job.turns[0].was_cut == (20 + asked + answered > window)


def test_classes_come_in_their_shares_with_lengths_of_their_own() -> None:
    texts = ["gold:1:priority=10,ttft_ms=200,input=5,tenant=a", "rest:3:cache_salt=s"]
    classes = parse_classes(texts, Slo(ttft_ms=900, tpot_ms=50))
    gold, rest = classes
    assert gold.slo == Slo(ttft_ms=200, tpot_ms=50)
    assert rest.slo == Slo(ttft_ms=900, tpot_ms=50)
    assert (gold.priority, gold.tenant, rest.priority, rest.cache_salt) == (10, "a", None, "s")
    jobs = list(workload(classes=classes, requests=4000).jobs("1"))
    of_gold = [job for job in jobs if job.load_class is gold]
    assert len(of_gold) / 4000 == pytest.approx(0.25, abs=0.03)
    assert {job.turns[0].segments[0].num_tokens for job in of_gold} == {5}


def test_a_trace_becomes_jobs_at_its_times() -> None:
    trace = read_trace([line(), line(timestamp=2000, hash_ids=[7, 9])], name="t", limit=10)
    jobs: list[Job] = list(workload(trace=trace, is_open=True, length_scale=1 / 16, time_scale=2.0).jobs("1"))
    assert [job.start_s for job in jobs] == [0.0, 4.0]
    assert [[segment.name for segment in job.turns[0].segments] for job in jobs] == [
        ["block 7", "block 8"],
        ["block 7", "block 9"],
    ]
    assert [sum(segment.num_tokens for segment in job.turns[0].segments) for job in jobs] == [38, 38]
    assert jobs[0].turns[0].output_tokens == 3


@pytest.mark.parametrize(
    "text", ["gold", "gold:0", ":1", "gold:1:speed=2", "gold:1:priority=high", "gold:1:ttft_ms=-1", "a:1:input=0"]
)
def test_classes_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--class"):
        LoadClass.parse(text)


@pytest.mark.parametrize("text", ["turns=0", "turns=1.5", "users=3", "think_s=-1", "turns"])
def test_sessions_that_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--sessions"):
        SessionShape.parse(text)


def test_points_of_a_plan() -> None:
    assert Plan().points() == [Point(label="8 at once", concurrency=8)]
    assert Plan(rate_per_s=2.5).points() == [Point(label="2.5/s", rate_per_s=2.5)]
    assert Plan(trace="t").points() == [Point(label="trace")]
    assert Plan(trace="t", rate_per_s=3).points() == [Point(label="3/s", rate_per_s=3)]
    assert [point.rate_per_s for point in Plan(sweep="rate=1,2,4").points()] == [1, 2, 4]
    assert [point.concurrency for point in Sweep.parse("concurrency=1,8").points()] == [1, 8]


def test_a_plan_is_always_bounded() -> None:
    def most(**values: Any) -> int:
        plan = Plan(**values)
        return plan.max_requests(plan.points()[0])

    assert most(concurrency=4) == 200
    assert most(concurrency=4, requests=7) == 7
    # Time is to end an open loop, and the number only what runs away.
    assert 100 * 60 < most(rate_per_s=100.0) <= 1_000_000
    assert most(trace="t") == 1_000_000
    assert most(rate_per_s=1e6, duration_s=1e6) == 1_000_000


@pytest.mark.parametrize(
    "values",
    [
        {"rate_per_s": 1.0, "concurrency": 2},
        {"sweep": "rate=1", "concurrency": 2},
        {"sweep": "speed=1"},
        {"sweep": "concurrency=1.5"},
        {"sweep": "rate="},
        {"sessions": "turns=2", "trace": "t"},
        {"vocabulary": 100},
        {"slo": "ttft=3"},
        {"classes": ("a:1", "a:2")},
        {"arrivals": "daily"},
    ],
)
def test_plans_that_are_refused_before_anything_is_sent(values: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        Plan(**values).check()
