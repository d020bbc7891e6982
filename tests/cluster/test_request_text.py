"""`baton trace` and `baton explain` as text, and what is said where no router knows a request."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.cluster.admin_client import Asked, found_answers
from baton.cluster.explain_text import explain_text
from baton.cluster.trace_text import trace_lines
from baton.errors import AuthenticationError, NotFoundError, UnavailableError
from baton.router.timelines import Timeline, as_json


def candidate(name: str, total: float, *, dropped_by: str = "", **scores: float) -> dict[str, Any]:
    weights = {"prefix": 1.0, "load": 0.5}
    scored = {key: {"score": score, "weight": weights[key]} for key, score in scores.items()}
    return {"instance": name, "scores": scored, "total": total, "dropped_by": dropped_by}


def option(prefill: str | None, cost_s: float, /, **parts: float) -> dict[str, Any]:
    return {
        "prefill": prefill,
        "new_tokens": 1200,
        "cost_s": cost_s,
        "ttft_s": cost_s - 0.001,
        "tpot_s": 0.004,
        "imposed_s": 0.001,
        "parts": parts,
    }


DECISION = {
    "policy": "kv_aware",
    "decode": {
        "candidates": [
            candidate("decode-0", 0.6, prefix=0.1, load=1.0),
            candidate("decode-2", 0.0, dropped_by="memory"),
            candidate("decode-1", 1.25, prefix=0.75, load=1.0),
        ],
        "chosen": "decode-1",
    },
    "prefill": {"candidates": [candidate("prefill-0", 0.5, load=1.0)], "chosen": "prefill-0"},
    "handover": {
        "mode": "auto",
        "options": [
            option(None, 0.09, prefill=0.08),
            option("prefill-0", 0.05, queue=0.01, prefill=0.03, transfer=0.0),
        ],
        "chosen": "prefill-0",
        "reason": "50.0 ms instead of 90.0 ms",
    },
}


def explained(decision: Any = DECISION, **fields: Any) -> dict[str, Any]:
    told = {"unique_id": "a-ff-0", "choice": 0, "attempt": 0, "age_s": 2.5, "decision": decision}
    return {"router": "router-0", "request_id": "a", "decisions": [told], "left_out": 0, "namesakes": 0, **fields}


def test_an_explanation() -> None:
    assert explain_text(explained()).splitlines() == [
        "a-ff-0: choice 0, attempt 0, 2.5 s ago on router-0, policy kv_aware",
        "",
        "decode: decode-1 writes the answer",
        "                prefix  load  total",
        "                    x1  x0.5",
        "  ->  decode-1    0.75  1.00  1.250",
        "      decode-0    0.10  1.00  0.600",
        "      decode-2       -     -      -  left out: memory",
        "",
        "prefill: prefill-0 suits best",
        "                 load  total",
        "                 x0.5",
        "  ->  prefill-0  1.00  0.500",
        "",
        "handover (auto): prefill-0 reads the prompt and hands it over",
        "  50.0 ms instead of 90.0 ms",
        "      read by          new tokens  TTFT ms  TPOT ms  holds up ms  cost ms",
        "  ->  prefill-0             1,200     49.0      4.0          1.0     50.0  TTFT: queue 10.0, prefill 30.0",
        "      decode-1 itself       1,200     89.0      4.0          1.0     90.0  TTFT: prefill 80.0",
    ]


def test_an_explanation_of_little() -> None:
    bare = {
        "decode": {"candidates": [], "chosen": "decode-0"},
        "prefill": {"candidates": [], "chosen": None},
        "handover": {"mode": "never", "options": [], "chosen": None, "reason": ""},
    }
    text = explain_text(explained(bare, left_out=3, namesakes=2))
    assert "handover (never): decode-0 reads the prompt itself\n  no reason is told" in text
    assert "3 earlier decisions are left out" in text
    assert "2 earlier requests had the same id" in text


def timeline() -> Timeline:
    told = Timeline(
        request_id="a",
        unique_id="a-ff-0",
        arrived_unix_s=1.0,
        prompt_tokens=1200,
        cached_tokens=200,
        completion_tokens=11,
        ttft_s=0.05,
        duration_s=0.1,
        outcome="length",
        prefill_instance="prefill-0",
        decode_instance="decode-1",
    )
    told.add("queue", 0.0, 0.0)
    told.add("prefill", 0.01, 0.04, where="prefill-0")
    told.add("attempt", 0.01, 0.09, where="decode-1")
    told.add("stream", 0.05, 0.05, where="decode-1")
    return told


def test_a_waterfall() -> None:
    lines = trace_lines({**as_json([timeline()]), "router": "router-0"}, width=78)
    assert [line.text for line in lines] == [
        "request a on router-0",
        "",
        "choice 0, length, prefill-0 -> decode-1, 1,200 prompt tokens (200 cached), 11 written, first token 50.0 ms,"
        " all 100.0 ms, 200 tokens/s",
        "             where      at ms  took ms  0                                100.0",
        "  queue      router-0     0.0      0.0  █",
        "  attempt 0  decode-1    10.0     90.0     ───────────────────────────────────",
        "    prefill  prefill-0   10.0     40.0     ████████████████",
        "  stream     decode-1    50.0     50.0                     ███████████████████",
    ]
    assert next(line.text[line.bar_at :].strip(" ") for line in lines if line.bar_at >= 0) == "█"


def test_a_request_in_work_and_one_that_failed() -> None:
    fresh = Timeline(request_id="a", unique_id="a-ff-0", arrived_unix_s=1.0)
    text = "\n".join(line.text for line in trace_lines(as_json([fresh]), width=80))
    assert "in work" in text
    assert "no span is known yet" in text
    failed = timeline()
    failed.outcome, failed.error, failed.is_truncated = "error", "no worker is ready", True
    text = "\n".join(line.text for line in trace_lines(as_json([failed]), width=80))
    assert "tokens/s: no worker is ready" in text
    assert "later spans are missing" in text


spans = st.tuples(
    st.sampled_from(["queue", "attempt", "prefill", "stream", "other"]), st.floats(0, 1e5), st.floats(0, 1e5)
)


@given(st.lists(spans, min_size=1, max_size=9), st.integers(1, 200))
def test_bars_stay_within_the_line(told: list[tuple[str, float, float]], width: int) -> None:
    one = Timeline(request_id="a", unique_id="a-ff-0", arrived_unix_s=1.0)
    for name, start_s, duration_s in told:
        one.add(name, start_s, duration_s, where="decode-0")
    drawn = [line for line in trace_lines(as_json([one]), width=width) if line.bar_at >= 0]
    assert len(drawn) == len(told)
    for line in drawn:
        assert line.text[line.bar_at :].strip(" ")
        assert len(line.text) <= max(width, line.bar_at + 20)


def asked(status: int, **fields: Any) -> Asked:
    return Asked(router_id=f"router-{status}", url="http://here", status=status, **fields)


def test_what_routers_say_is_put_together() -> None:
    known, unknown = asked(200, answer={"a": 1}), asked(404, problem="it is not known here")
    assert found_answers([unknown, known], "x") == [{"a": 1}]
    with pytest.raises(NotFoundError) as caught:
        found_answers([unknown, asked(0, problem="no answer: refused")], "x")
    assert "router-404 at http://here: it is not known here" in caught.value.message
    assert "router-0 at http://here: no answer: refused" in caught.value.message
    with pytest.raises(AuthenticationError, match="--api-key"):
        found_answers([asked(401, problem="no key"), unknown], "x")
    with pytest.raises(UnavailableError, match="no router answers"):
        found_answers([asked(0, problem="refused")], "x")
    with pytest.raises(UnavailableError):
        found_answers([], "x")
