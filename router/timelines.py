"""Where the last requests of this router spent their time: a bounded store, whatever else traces them.

    begin(...) -> Timeline --the client adds spans as they are known--> end(...)      find(request id) -> its timelines

Shown by `baton trace` and `GET /admin/trace/{id}`, as `as_json` describes. A request is in the store from its arrival
on; the oldest gives way to a new one, whether it has ended or not.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["MAX_SPANS", "Span", "Timeline", "Timelines", "as_json"]

MAX_SPANS = 64
"""Spans that one timeline keeps; a request that began on many workers loses the last ones."""
_MAX_TIMELINES = 1024


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a request's time.

    Attributes:
        name: "queue", "route", "attempt" (one dispatch, from submit to its end), "pause" (between two of them), a phase
            of an attempt ("reserve", "prefill_queue", "prefill", "transfer", "attach", "other", "first_step"; see
            `timing.py`), or "stream" (from the first token to the end).
        start_s: since the request's arrival.
        where: the instance that spent it; empty for this router.
        attempt: 0 for the first dispatch.
    """

    name: str
    start_s: float
    duration_s: float
    where: str = ""
    attempt: int = 0


@dataclass(slots=True, kw_only=True)
class Timeline:
    """One choice of one request.

    Attributes:
        request_id: as the client knows it, and `X-Request-Id` tells it; not unique where a client says so twice.
        unique_id: as the workers and their logs know it.
        choice: which of the request's choices.
        trace_id: of the OpenTelemetry trace, where there is one.
        arrived_unix_s: seconds since the epoch.
        ttft_s: from arrival to the first token.
        duration_s: from arrival to the end; None while it runs.
        outcome: "" while it runs, then "stop", "length", "abort" or "error".
        error: what the client was told, where it failed.
        prefill_instance, decode_instance: who read the prompt and wrote the answer, of the last attempt.
        is_truncated: there were more spans than `MAX_SPANS`.
    """

    request_id: str
    unique_id: str
    choice: int = 0
    trace_id: str = ""
    arrived_unix_s: float
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    ttft_s: float | None = None
    duration_s: float | None = None
    outcome: str = ""
    error: str = ""
    prefill_instance: str = ""
    decode_instance: str = ""
    spans: list[Span] = field(default_factory=list)
    is_truncated: bool = False

    def add(self, name: str, start_s: float, duration_s: float, *, where: str = "", attempt: int = 0) -> None:
        """Keep a span, while there is room."""
        if len(self.spans) >= MAX_SPANS:
            self.is_truncated = True
            return
        self.spans.append(Span(name, start_s, max(duration_s, 0.0), where, attempt))


class Timelines:
    """The newest `size` timelines of this router.

    Args:
        size: how many choices are kept; 0 keeps none.
    """

    def __init__(self, size: int = _MAX_TIMELINES) -> None:
        assert size >= 0, size
        self._size = size
        self._by_unique_id: OrderedDict[str, Timeline] = OrderedDict()

    def __len__(self) -> int:
        return len(self._by_unique_id)

    def begin(self, timeline: Timeline) -> None:
        """Keep `timeline` from now on; whoever has it goes on writing to it."""
        self._by_unique_id[timeline.unique_id] = timeline
        while len(self._by_unique_id) > self._size:
            self._by_unique_id.popitem(last=False)

    def find(self, request_id: str) -> list[Timeline]:
        """The timelines of the newest request with this id, or the one with this unique id; none where it is gone."""
        one = self._by_unique_id.get(request_id)
        if one is not None:
            return [one]
        matching = [timeline for timeline in self._by_unique_id.values() if timeline.request_id == request_id]
        if not matching:
            return []
        # Choices of one request differ in what follows the last dash only.
        newest = matching[-1].unique_id.rpartition("-")[0]
        return [timeline for timeline in matching if timeline.unique_id.rpartition("-")[0] == newest]

    def newest(self, count: int) -> list[Timeline]:
        """The last `count` that began, newest first."""
        found: list[Timeline] = []
        for timeline in reversed(self._by_unique_id.values()):
            if len(found) == count:
                break
            found.append(timeline)
        return found


def as_json(timelines: Sequence[Timeline]) -> dict[str, Any]:
    """What `GET /admin/trace/{id}` answers for the timelines of one request, at least one; times in seconds.

    ```json
    {"request_id": "abc", "trace_id": "", "arrived_unix_s": 1764422000.1,
     "choices": [
       {"choice": 0, "unique_id": "abc-1f2e3d4c-0", "outcome": "length", "error": "",
        "prefill_instance": "prefill-0", "decode_instance": "decode-1",
        "prompt_tokens": 512, "cached_tokens": 256, "completion_tokens": 64, "ttft_s": 0.105, "duration_s": 0.94,
        "is_truncated": false,
        "spans": [
          {"name": "queue", "start_s": 0.0, "duration_s": 0.002, "where": "", "attempt": 0},
          {"name": "prefill", "start_s": 0.004, "duration_s": 0.09, "where": "prefill-0", "attempt": 0}]}]}
    ```

    `ttft_s` and `duration_s` are null, and `outcome` is empty, while they are not known.
    """
    first = timelines[0]
    return {
        "request_id": first.request_id,
        "trace_id": first.trace_id,
        "arrived_unix_s": first.arrived_unix_s,
        "choices": [_choice_json(timeline) for timeline in sorted(timelines, key=lambda timeline: timeline.choice)],
    }


def _choice_json(timeline: Timeline) -> dict[str, Any]:
    return {
        "choice": timeline.choice,
        "unique_id": timeline.unique_id,
        "outcome": timeline.outcome,
        "error": timeline.error,
        "prefill_instance": timeline.prefill_instance,
        "decode_instance": timeline.decode_instance,
        "prompt_tokens": timeline.prompt_tokens,
        "cached_tokens": timeline.cached_tokens,
        "completion_tokens": timeline.completion_tokens,
        "ttft_s": timeline.ttft_s,
        "duration_s": timeline.duration_s,
        "is_truncated": timeline.is_truncated,
        "spans": [
            {
                "name": span.name,
                "start_s": round(span.start_s, 6),
                "duration_s": round(span.duration_s, 6),
                "where": span.where,
                "attempt": span.attempt,
            }
            for span in timeline.spans
        ],
    }
