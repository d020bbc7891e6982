"""From what came to figures: events, answers, records, statistics against numpy, goodput by hand."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.loadgen.answer import Answer, EventLines, MalformedAnswerError
from baton.cluster.loadgen.plan import Point
from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.result import PointResult, Result
from baton.cluster.loadgen.slo import Slo
from baton.cluster.loadgen.summary import CDF_POINTS, Distribution, Summary
from baton.errors import ConfigError

VALUES = st.lists(st.floats(0, 1e6), min_size=1, max_size=200)


def record(**values: Any) -> Record:
    """Answered on time: 100 ms to the first of three tokens, 20 ms and 40 ms to the next."""
    defaults: dict[str, Any] = {
        "index": 0,
        "turn": 0,
        "class_name": "all",
        "scheduled_s": 1.0,
        "sent_s": 1.0,
        "end_s": 1.16,
        "outcome": Outcome.OK,
        "asked_tokens": 3,
        "chunk_at_s": [1.1, 1.12, 1.16],
        "prompt_tokens": 10,
        "output_tokens": 3,
    }
    return Record(**{**defaults, **values})


def summary(*records: Record, slo: Slo | None = None, duration_s: float = 10.0) -> Summary:
    return Summary.of(records, duration_s=duration_s, slos={"all": slo or Slo()})


# Events

STREAM = (
    b': comment\r\ndata: {"choices": [{"index": 0, "text": "a"}]}\r\n\r\nevent: x\ndata:{"choices": []}\n\n'
    b'data: {"choices": [{"text": "\\n"}]}\n\ndata: [DONE]\n\n'
)


@given(cuts=st.sets(st.integers(0, len(STREAM)), max_size=12))
def test_events_are_the_same_wherever_the_stream_is_cut(cuts: set[int]) -> None:
    lines, found = EventLines(), []
    edges = [0, *sorted(cuts), len(STREAM)]
    for begin, end in pairwise(edges):
        found += lines.feed(STREAM[begin:end])
    assert [json.loads(event)["choices"] for event in found] == [
        [{"index": 0, "text": "a"}],
        [],
        [{"text": "\n"}],
    ]


def test_an_answer_of_completions() -> None:
    answer = Answer()
    for now_s, text, ids, reason in ((1.0, "a", [5], None), (2.0, "", [6], None), (3.0, "bc", [7, 8], None)):
        choice = {"index": 0, "text": text, "token_ids": ids, "finish_reason": reason}
        answer.take_event(json.dumps({"choices": [choice], "usage": None}).encode(), now_s)
    answer.take_event(b'{"choices": [{"index": 0, "text": "", "finish_reason": "length"}]}', 3.5)
    usage = {"prompt_tokens": 9, "completion_tokens": 4, "prompt_tokens_details": {"cached_tokens": 8}}
    answer.take_event(json.dumps({"choices": [], "usage": usage}).encode(), 4.0)
    assert answer.chunk_at_s == [1.0, 2.0, 3.0]
    assert (answer.end_s, answer.seen_tokens, answer.output_tokens, answer.finish_reason) == (3.5, 4, 4, "length")
    assert ("".join(answer.text), answer.token_ids) == ("abc", [5, 6, 7, 8])
    assert (answer.prompt_tokens, answer.cached_tokens) == (9, 8)


def test_an_answer_of_a_chat_begins_with_its_first_text() -> None:
    answer = Answer()
    answer.take_event(b'{"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}', 1.0)
    answer.take_event(b'{"choices": [{"index": 0, "delta": {"content": "hi"}, "finish_reason": null}]}', 2.0)
    answer.take_event(b'{"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}', 3.0)
    assert answer.chunk_at_s == [2.0]
    assert (answer.end_s, answer.finish_reason, answer.output_tokens) == (3.0, "stop", 1)


def test_what_is_no_answer_is_told_apart_from_an_error() -> None:
    answer = Answer()
    answer.take_event(b'{"error": {"message": "out of blocks", "code": 500}}', 1.0)
    assert answer.error == "out of blocks"
    for event in (b"{", b"[]", b'{"choices": [3]}', b'{"choices": 3}', b'"x"', b"null"):
        with pytest.raises(MalformedAnswerError):
            Answer().take_event(event, 1.0)
    refused = Answer(http_status=500)
    refused.take_refusal(b"<html>oops</html>")
    assert refused.error == "<html>oops</html>"


# Statistics


@given(values=VALUES)
def test_distributions_are_those_of_numpy(values: list[float]) -> None:
    found = Distribution.of(values)
    assert found is not None
    assert (found.count, found.max) == (len(values), max(values))
    assert found.mean == pytest.approx(float(np.mean(values)))
    for share, value in ((0.5, found.p50), (0.9, found.p90), (0.95, found.p95), (0.99, found.p99)):
        assert value == pytest.approx(float(np.quantile(values, share)), rel=1e-9, abs=1e-9)
    assert found.quantiles == pytest.approx(np.quantile(values, np.linspace(0, 1, CDF_POINTS)).tolist(), abs=1e-6)


def test_no_values_have_no_distribution() -> None:
    assert Distribution.of([]) is None


def test_latencies_count_from_the_scheduled_time() -> None:
    late = record(scheduled_s=0.5, sent_s=1.0)
    assert late.lag_s == pytest.approx(0.5)
    assert late.ttft_s == pytest.approx(0.6)
    assert late.tpot_s == pytest.approx(0.03)
    assert late.e2e_s == pytest.approx(0.66)
    assert late.gaps_s() == pytest.approx([0.02, 0.04])


def test_a_single_token_has_no_tpot() -> None:
    one = record(output_tokens=1, chunk_at_s=[1.1])
    assert one.tpot_s is None
    assert summary(one, slo=Slo(tpot_ms=1)).attainment == 1.0


def test_figures_of_a_run() -> None:
    found = summary(
        record(),
        record(chunk_at_s=[1.3, 1.4], output_tokens=3, end_s=1.4, cached_tokens=4, prompt_tokens=30),
        record(outcome=Outcome.REJECTED, chunk_at_s=[], rejections=1),
        record(outcome=Outcome.FAILED, chunk_at_s=[1.05]),
    )
    assert (found.requests, found.ok, found.rejected, found.failed) == (4, 2, 1, 1)
    assert (found.rejection_rate, found.abort_rate, found.rejections) == (0.25, 0.25, 1)
    assert (found.requests_per_s, found.output_tokens_per_s, found.input_tokens_per_s) == (0.2, 0.6, 4.0)
    assert found.cached_tokens == 4
    assert found.ttft_ms is not None
    assert found.ttft_ms.mean == pytest.approx(200)
    assert found.itl_ms is not None
    assert found.itl_ms.count == 3
    assert found.chunks_per_token == pytest.approx(5 / 6)
    assert (found.goodput_per_s, found.attainment) == (None, None)


# Goodput


@pytest.mark.parametrize(
    ("slo", "good"),
    [
        (Slo(ttft_ms=100.5), 2),
        (Slo(ttft_ms=99), 0),
        (Slo(ttft_ms=601), 3),
        (Slo(tpot_ms=30.5), 3),
        (Slo(tpot_ms=29), 0),
        (Slo(ttft_ms=601, tpot_ms=30.5, e2e_ms=170), 2),
    ],
)
def test_goodput_by_hand(slo: Slo, good: int) -> None:
    # Two answers in time, one that was due half a second earlier, and four that were never answered.
    records = [record(), record(), record(scheduled_s=0.5)]
    lost = (Outcome.REJECTED, Outcome.FAILED, Outcome.UNFINISHED, Outcome.NOT_SENT)
    records += [record(outcome=outcome) for outcome in lost]
    found = summary(*records, slo=slo, duration_s=2.0)
    assert found.attainment == pytest.approx(good / 7)
    assert found.goodput_per_s == pytest.approx(good / 2)


def test_each_class_is_held_to_its_own_objective() -> None:
    records = [record(class_name="gold"), record(class_name="rest"), record(class_name="rest", end_s=2.0)]
    slos = {"gold": Slo(ttft_ms=50), "rest": Slo(e2e_ms=500)}
    found = PointResult.of(Point(label="x"), records, duration_s=1.0, slos=slos, cpu_share=0.1, ended_early=False)
    assert found.summary.attainment == pytest.approx(1 / 3)
    assert found.classes["gold"].attainment == 0
    assert found.classes["rest"].attainment == 0.5


def test_a_slo_in_words() -> None:
    assert str(Slo.parse("ttft_ms=300,tpot_ms=50")) == "TTFT <= 300 ms, TPOT <= 50 ms"
    assert not Slo.parse("")
    for text in ("ttft_ms", "ttft_ms=0", "itl_ms=3", "ttft_ms=1,ttft_ms=2"):
        with pytest.raises(ConfigError, match="--slo"):
            Slo.parse(text)


# Results


def point_of(*records: Record, cpu_share: float = 0.1) -> PointResult:
    slos = {"all": Slo(ttft_ms=300)}
    return PointResult.of(
        Point(label="2/s", rate_per_s=2.0), records, duration_s=5.0, slos=slos, cpu_share=cpu_share, ended_early=False
    )


def test_what_makes_figures_doubtful_is_said() -> None:
    assert point_of(record()).warnings() == []
    doubtful = point_of(
        record(scheduled_s=0.9, asked_tokens=4, was_cut=True),
        record(outcome=Outcome.NOT_SENT, detail="9 requests were running already"),
        cpu_share=0.93,
    )
    text = "\n".join(doubtful.warnings())
    bunched = point_of(record(chunk_at_s=[1.1, 1.1, 1.16])).warnings()
    assert any("50% of chunks came together" in text for text in bunched)
    for said in ("late: it sent 100.0 ms", "93% of its core", "1 requests were not sent", "another length", "were cut"):
        assert said in text
    assert doubtful.errors == {"9 requests were running already": 1}


def test_a_result_survives_json() -> None:
    result = Result(parameters={"rate_per_s": 2.0}, about={"seed": 1}, points=[point_of(record())])
    again = Result.from_json(result.to_json(), "x.json")
    assert again == result
    assert json.loads(result.to_json())["points"][0]["warnings"] == []
    for text in ("{", "{}", '{"format": "other"}', "[]"):
        with pytest.raises(ConfigError, match=r"x\.json"):
            Result.from_json(text, "x.json")
