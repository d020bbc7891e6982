"""What is noted of a request, by a clock of the test's own."""

from __future__ import annotations

from baton.engine.request import Phases
from baton.router.journal import Journal
from baton.router.timelines import Timeline


def test_a_second_token_that_took_no_time_is_not_another_first() -> None:
    now_s = [10.0]
    timeline = Timeline(request_id="r", unique_id="r-0-0", choice=0, arrived_unix_s=0.0, prompt_tokens=4)
    journal = Journal(timeline, arrived_s=10.0, now_s=lambda: now_s[0], root=None)
    journal.admitted()
    journal.dispatched(10.0, 0, "decode-0", None)
    assert not journal.has_begun(0)
    now_s[0] = 10.5
    journal.first_token(Phases(prefill_s=0.25), 0, prefill_instance="decode-0")
    assert journal.has_begun(0)
    now_s[0] = 10.75
    journal.second_token(Phases(first_step_s=0.0), 0)
    others = [span for span in timeline.spans if span.name == "other"]
    assert [span.duration_s for span in others] == [0.25]
    assert journal.timing is not None
    assert journal.timing.ttft_s == 0.5
    assert not journal.has_begun(1)
