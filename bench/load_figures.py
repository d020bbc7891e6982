"""What a client saw of a load, and the figures made of it. Pure.

Stream   one request: time to the first chunk, gaps between chunks, counts that the server told
Run      all requests of a load, and how long they took together
Figures  the row of a table; `median` makes one row of several rounds
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

__all__ = ["Figures", "Run", "Stream", "median", "percentile"]


@dataclass(frozen=True, slots=True)
class Stream:
    """One answer as it came: seconds from the request to the first chunk, from each chunk to the next, to the end."""

    first_s: float
    gaps_s: list[float]
    total_s: float
    prompt_tokens: int
    tokens: int


@dataclass(frozen=True, slots=True)
class Run:
    """A load that was served."""

    streams: list[Stream]
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One row.

    TTFT is over requests. TPOT is of each request: the time after its first token over the tokens after it. ITL is over
    all gaps between chunks of all requests; `chunks_per_token` below 1 says that some chunks held several tokens.
    """

    requests: int
    output_tokens_per_s: float
    ttft_mean_ms: float
    ttft_p50_ms: float
    ttft_p99_ms: float
    tpot_median_ms: float
    itl_p50_ms: float
    itl_p99_ms: float
    itl_max_ms: float
    chunks_per_token: float

    @classmethod
    def of(cls, run: Run) -> Figures:
        """Of at least one stream."""
        assert run.streams, "a run of no requests"
        first = [stream.first_s for stream in run.streams]
        gaps = [gap for stream in run.streams for gap in stream.gaps_s]
        each = [(stream.total_s - stream.first_s) / max(1, stream.tokens - 1) for stream in run.streams]
        tokens = sum(stream.tokens for stream in run.streams)
        return cls(
            requests=len(run.streams),
            output_tokens_per_s=tokens / run.wall_s,
            ttft_mean_ms=statistics.mean(first) * 1e3,
            ttft_p50_ms=percentile(first, 0.5) * 1e3,
            ttft_p99_ms=percentile(first, 0.99) * 1e3,
            tpot_median_ms=statistics.median(each) * 1e3,
            itl_p50_ms=percentile(gaps, 0.5) * 1e3,
            itl_p99_ms=percentile(gaps, 0.99) * 1e3,
            itl_max_ms=max(gaps, default=0.0) * 1e3,
            chunks_per_token=(len(gaps) + len(run.streams)) / tokens,
        )


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all do not exceed, between two of them by the line from one to the other; 0 of none."""
    if not values:
        return 0.0
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def median(rounds: Sequence[Figures]) -> Figures:
    """Each figure's median over rounds of the same load."""
    assert rounds
    values = {field.name: statistics.median(getattr(row, field.name) for row in rounds) for field in fields(Figures)}
    return Figures(**{**values, "requests": rounds[0].requests})
