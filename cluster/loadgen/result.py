"""What a bench found, to and from JSON. Pure.

PointResult   of one run: summaries of all and of each class, how the generator itself did, what went wrong
Result        of a bench: points, parameters, seed, versions, machine
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from baton.cluster.loadgen.plan import Point
from baton.cluster.loadgen.records import Outcome, Record
from baton.cluster.loadgen.slo import Slo
from baton.cluster.loadgen.summary import Distribution, Summary
from baton.errors import ConfigError

__all__ = ["PointResult", "Result"]

_FORMAT = "baton bench 1"
# A generator that is later than this, or than this share of the median TTFT, is part of what it measures.
_LATE_MS = 5.0
_LATE_SHARE = 0.05
_BUSY_SHARE = 0.8
_BUNCHED_SHARE = 0.05
_MAX_ERRORS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PointResult:
    """`lag_ms`: how late requests were sent. `cpu_share`: of one core. `errors`: texts and how often."""

    label: str
    rate_per_s: float | None
    concurrency: int | None
    summary: Summary
    classes: dict[str, Summary]
    lag_ms: Distribution | None
    cpu_share: float
    ended_early: bool
    errors: dict[str, int]

    @classmethod
    def of(
        cls,
        point: Point,
        records: Sequence[Record],
        *,
        duration_s: float,
        slos: Mapping[str, Slo],
        cpu_share: float,
        ended_early: bool,
    ) -> PointResult:
        """Of a run's records."""
        by_class = {name: [record for record in records if record.class_name == name] for name in slos}
        sent = [record.lag_s * 1e3 for record in records if record.outcome is not Outcome.NOT_SENT]
        errors = Counter(record.detail for record in records if record.detail)
        return cls(
            label=point.label,
            rate_per_s=point.rate_per_s,
            concurrency=point.concurrency,
            summary=Summary.of(records, duration_s=duration_s, slos=slos),
            classes={
                name: Summary.of(of_class, duration_s=duration_s, slos={name: slos[name]})
                for name, of_class in by_class.items()
            }
            if len(slos) > 1
            else {},
            lag_ms=Distribution.of(sent),
            cpu_share=cpu_share,
            ended_early=ended_early,
            errors=dict(errors.most_common(_MAX_ERRORS)),
        )

    def warnings(self) -> list[str]:
        """What makes the figures doubtful, in words."""
        found: list[str] = []
        summary, lag, ttft = self.summary, self.lag_ms, self.summary.ttft_ms
        late_ms = max(_LATE_MS, _LATE_SHARE * (ttft.p50 if ttft else 0.0))
        if lag is not None and lag.p99 > late_ms:
            found.append(f"the generator was late: it sent {lag.p99:.1f} ms after time at the 99th percentile")
        if self.cpu_share > _BUSY_SHARE:
            found.append(f"the generator used {self.cpu_share:.0%} of its core: it may be what is measured")
        if summary.not_sent:
            found.append(f"{summary.not_sent} requests were not sent: too many were running (--max-in-flight)")
        if summary.short_answers:
            found.append(f"{summary.short_answers} answers were of another length than asked")
        if summary.cut_prompts:
            found.append(f"{summary.cut_prompts} prompts were cut to fit into the model's window")
        if summary.ok and summary.chunks_per_token < 0.95:
            found.append(
                f"{summary.chunks_per_token:.2f} chunks per token: ITL is between chunks, some of several tokens"
            )
        if summary.bunched_share > _BUNCHED_SHARE:
            found.append(
                f"{summary.bunched_share:.0%} of chunks came together with the one before: ITL is not to be trusted"
            )
        if self.ended_early:
            found.append("ended early")
        return found

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {**asdict(self), "warnings": self.warnings()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> PointResult:
        """What `as_dict` made."""
        read = {key: value for key, value in values.items() if key != "warnings"}
        return cls(
            **{
                **read,
                "summary": Summary.from_dict(values["summary"]),
                "classes": {name: Summary.from_dict(each) for name, each in values["classes"].items()},
                "lag_ms": Distribution.from_dict(values["lag_ms"]),
            }
        )


@dataclass(kw_only=True)
class Result:
    """A whole bench. `about` says where and with what: command, versions, machine, server, begin."""

    parameters: dict[str, Any]
    about: dict[str, Any]
    points: list[PointResult] = field(default_factory=list)

    def to_json(self) -> str:
        """With the format's name first."""
        points = [point.as_dict() for point in self.points]
        values = {"format": _FORMAT, "about": self.about, "parameters": self.parameters, "points": points}
        return json.dumps(values, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str, name: str) -> Result:
        """What `to_json` wrote.

        Raises:
            ConfigError: something else.
        """
        try:
            values = json.loads(text)
            if values["format"] != _FORMAT:
                raise ConfigError(f"{name} must be of format {_FORMAT!r}, is of {values['format']!r}")
            points = [PointResult.from_dict(point) for point in values["points"]]
            return cls(parameters=values["parameters"], about=values["about"], points=points)
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{name} is no result of `baton bench --json` ({type(error).__name__}: {error})"
            ) from error
