"""From what was seen to what it cost, and which promises broke."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from typing import Any

import pytest
from rich.console import Console

from baton.cluster.chaos.members import Member
from baton.cluster.chaos.report import Change, Facts, Outcome, Report, StrikeRecord, percentile, ready_again_s
from baton.cluster.chaos.report_text import render


def outcome(**fields: Any) -> Outcome:
    return Outcome(**{"number": 1, "began_s": 0.0, "ended_s": 2.0, "tokens": 96, "longest_wait_s": 0.1, **fields})


KILL = StrikeRecord(scenario="kill-decode", began_s=5.0, instance_id="decode-0", incarnation="aa", is_kill=True)
CHANGES = (
    Change(5.2, "decode-0", "", "dead"),
    Change(6.0, "decode-1", "cc", "ready"),
    Change(7.0, "decode-0", "bb", "starting"),
    Change(8.5, "decode-0", "bb", "ready"),
)
GOOD = Facts(
    title="kill-decode",
    duration_s=20.0,
    clients=2,
    outcomes=(outcome(), outcome(longest_wait_s=1.5), outcome(reconnects=1)),
    strikes=(KILL,),
    changes=CHANGES,
    undisturbed_wait_s=0.05,
    resumes=2,
    members=(Member(instance_id="decode-0", role="decode"),),
    owned={"decode-0": 0},
    settle_s=0.4,
    settle_limit_s=31.0,
)


def test_a_kill_is_over_when_another_incarnation_is_ready() -> None:
    assert ready_again_s(KILL, CHANGES) == 3.5
    assert ready_again_s(KILL, CHANGES[:3]) is None
    # Still listed as ready, as what it was: nobody has noticed yet.
    assert ready_again_s(KILL, (Change(5.1, "decode-0", "aa", "ready"),)) is None


def test_a_stop_is_over_when_the_instance_is_ready_after_it_was_lifted() -> None:
    stop = replace(KILL, scenario="stop-decode", is_kill=False, lifted_s=8.0)
    assert ready_again_s(stop, ()) == 0.0
    away = Change(7.5, "decode-0", "", "")
    assert ready_again_s(stop, (away, Change(8.25, "decode-0", "aa", "ready"))) == 0.25
    assert ready_again_s(stop, (away,)) is None


def test_percentiles() -> None:
    assert percentile([], 0.99) == 0.0
    assert percentile([3.0, 1.0, 2.0], 0.5) == 2.0
    assert percentile([float(value) for value in range(100)], 0.99) == 99.0


def test_what_went_well_breaks_nothing() -> None:
    report = Report.of(GOOD)
    assert not report.broken
    assert (report.requests, report.failed, report.wrong, report.resumed, report.reconnected) == (3, 0, 0, 2, 1)
    assert (report.wait_max_s, report.ready_again_max_s) == (1.5, 3.5)
    told = json.loads(json.dumps(report.as_dict()))
    assert told["longest_wait_s"]["max"] == 1.5
    assert told["strikes"][0]["ready_again_s"] == 3.5
    assert told["broken"] == []


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"outcomes": (outcome(), outcome(error="status 500: no"))}, "1 of 2 requests failed"),
        ({"outcomes": (outcome(is_wrong=True),)}, "1 of 1 answers have wrong tokens"),
        ({"outcomes": (outcome(refusals=2), outcome())}, "1 of 2 requests were refused"),
        ({"outcomes": ()}, "no request came to its end"),
        ({"settle_s": None, "owned": {"decode-0": 3, "decode-1": 0}}, "31 s after the last request: 3 on decode-0"),
        ({"settle_s": None, "owned": {}}, "workers silent"),
        ({"members": (Member(instance_id="decode-0", role="decode", state="dead"),)}, "not ready again: decode-0"),
        ({"strikes": (replace(KILL, was_done=False),)}, "no fault could be put in"),
    ],
)
def test_each_promise_can_break(change: dict[str, Any], words: str) -> None:
    (broken,) = Report.of(replace(GOOD, **change)).broken
    assert words in broken


def test_where_nobody_could_go_on_a_refusal_is_honest() -> None:
    facts = replace(GOOD, outcomes=(outcome(refusals=2),), has_spare=False)
    assert not Report.of(facts).broken
    assert Report.of(facts).refused == 1


def test_the_text_tells_all_of_it() -> None:
    facts = replace(GOOD, outcomes=(outcome(), outcome(error="status 500: no")), left=7)
    output = io.StringIO()
    Console(file=output, width=140).print(render(Report.of(facts)))
    for part in (
        "kill-decode",
        "decode-0",
        "3.5",
        "failed 1 times: status 500: no",
        "BROKEN: 1 of 2",
        "clients that left",
    ):
        assert part in output.getvalue()
    output = io.StringIO()
    Console(file=output, width=140).print(render(Report.of(GOOD)))
    assert "every promise was kept" in output.getvalue()
