"""What a run's records say: latencies, throughput, goodput, and what was refused or lost. Pure.

Distribution   of one latency
Summary        of one class, or of all; `of(records, ...)`

Definitions. Latencies count from the scheduled time. TTFT and TPOT are of each answered request, ITL of all gaps
between chunks of all of them, E2E to the last token. Rates are over the whole time from the begin to the last end. Good
is a request that was answered and kept its objective; attainment is the share of good among ALL that were due, refused,
lost and unsent ones included, and goodput is good ones a second.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.slo import Slo

__all__ = ["CDF_POINTS", "LATENCIES", "Distribution", "Summary", "percentile"]

# Quantiles that are kept for pictures: every half percent.
CDF_POINTS = 201
LATENCIES = ("ttft_ms", "tpot_ms", "itl_ms", "e2e_ms")


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value that `share` of an ascending row do not exceed, on the line between its neighbours."""
    assert ordered, "of no values"
    place = share * (len(ordered) - 1)
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """Of at least one value. `quantiles` are CDF_POINTS evenly spaced shares from 0 to 1."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float
    quantiles: list[float]

    @classmethod
    def of(cls, values: Sequence[float]) -> Distribution | None:
        """None of no values."""
        if not values:
            return None
        ordered = sorted(values)
        return cls(
            count=len(ordered),
            mean=sum(ordered) / len(ordered),
            p50=percentile(ordered, 0.50),
            p90=percentile(ordered, 0.90),
            p95=percentile(ordered, 0.95),
            p99=percentile(ordered, 0.99),
            max=ordered[-1],
            quantiles=[round(percentile(ordered, step / (CDF_POINTS - 1)), 6) for step in range(CDF_POINTS)],
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any] | None) -> Distribution | None:
        """What `asdict` made."""
        return None if values is None else cls(**values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of one run and class. A latency of no answers is None, and so are figures of an objective without one.

    Attributes:
        requests: all that were due.
        rejection_rate: share of requests that were rejected in the end; `rejections` counts every 429, waited out or
            not.
        abort_rate: share of requests that failed, were cut off, or could not be sent.
        chunks_per_token: below 1, some gaps of ITL span several tokens.
        bunched_share: of the chunks after a request's first, those that came in one piece with the one before:
            something between held them back, or this generator was too busy to look.
        short_answers: of other lengths than asked.
        cut_prompts: shortened to the model's window.
    """

    requests: int
    ok: int
    rejected: int
    failed: int
    unfinished: int
    not_sent: int
    rejections: int
    rejection_rate: float
    abort_rate: float
    duration_s: float
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    input_tokens: int
    cached_tokens: int | None
    output_tokens: int
    ttft_ms: Distribution | None
    tpot_ms: Distribution | None
    itl_ms: Distribution | None
    e2e_ms: Distribution | None
    goodput_per_s: float | None
    attainment: float | None
    chunks_per_token: float
    bunched_share: float
    short_answers: int
    cut_prompts: int

    @classmethod
    def of(cls, records: Sequence[Record], *, duration_s: float, slos: Mapping[str, Slo]) -> Summary:
        """Of records of the classes in `slos`; `duration_s` is positive."""
        assert duration_s > 0
        count = {outcome: sum(record.outcome is outcome for record in records) for outcome in Outcome}
        ok = [record for record in records if record.outcome is Outcome.OK]
        output_tokens = sum(record.output_tokens for record in ok)
        input_tokens = sum(record.prompt_tokens for record in ok)
        cached = [record.cached_tokens for record in ok if record.cached_tokens is not None]
        gaps_s = [gap for record in ok for gap in record.gaps_s()]
        has_slo = any(slos.values())
        good = sum(is_good(record, slos[record.class_name]) for record in records)
        all_of = max(1, len(records))
        return cls(
            requests=len(records),
            ok=len(ok),
            rejected=count[Outcome.REJECTED],
            failed=count[Outcome.FAILED],
            unfinished=count[Outcome.UNFINISHED],
            not_sent=count[Outcome.NOT_SENT],
            rejections=sum(record.rejections for record in records),
            rejection_rate=count[Outcome.REJECTED] / all_of,
            abort_rate=(count[Outcome.FAILED] + count[Outcome.UNFINISHED] + count[Outcome.NOT_SENT]) / all_of,
            duration_s=duration_s,
            requests_per_s=len(ok) / duration_s,
            input_tokens_per_s=input_tokens / duration_s,
            output_tokens_per_s=output_tokens / duration_s,
            input_tokens=input_tokens,
            cached_tokens=sum(cached) if cached else None,
            output_tokens=output_tokens,
            ttft_ms=_in_ms(record.ttft_s for record in ok),
            tpot_ms=_in_ms(record.tpot_s for record in ok),
            itl_ms=_in_ms(gaps_s),
            e2e_ms=_in_ms(record.e2e_s for record in ok),
            goodput_per_s=good / duration_s if has_slo else None,
            attainment=good / all_of if has_slo else None,
            chunks_per_token=sum(len(record.chunk_at_s) for record in ok) / max(1, output_tokens),
            bunched_share=sum(gap == 0 for gap in gaps_s) / max(1, len(gaps_s)),
            short_answers=sum(record.output_tokens != record.asked_tokens for record in ok),
            cut_prompts=sum(record.was_cut for record in records),
        )

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Summary:
        """What `as_dict` made."""
        return cls(**{**values, **{name: Distribution.from_dict(values[name]) for name in LATENCIES}})


def is_good(record: Record, slo: Slo) -> bool:
    """Whether a request was answered and kept its objective."""
    ttft_s = record.ttft_s
    if record.outcome is not Outcome.OK or ttft_s is None:
        return False
    return slo.is_met(ttft_s=ttft_s, tpot_s=record.tpot_s, e2e_s=record.e2e_s)


def _in_ms(values_s: Any) -> Distribution | None:
    return Distribution.of([value * 1e3 for value in values_s if value is not None])
