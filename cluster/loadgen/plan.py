"""The parameters of a bench, checked, and the points that it measures. Pure.

Plan     everything that a result depends on but the server; goes into the JSON as it is
Point    one run of a sweep, or the only one
Sweep    rate=1,2,4 or concurrency=1,8,32
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from baton.cluster.loadgen.arrivals import ArrivalProcess
from baton.cluster.loadgen.lengths import Lengths
from baton.cluster.loadgen.load_class import LoadClass, parse_classes
from baton.cluster.loadgen.option_text import parse_number
from baton.cluster.loadgen.prompts import FIRST_TOKEN
from baton.cluster.loadgen.sessions import SessionShape
from baton.cluster.loadgen.slo import Slo
from baton.cluster.loadgen.trace import TraceRow
from baton.cluster.loadgen.workload import Workload
from baton.errors import ConfigError

__all__ = ["Plan", "Point", "Sweep"]

_Swept = Literal["rate", "concurrency"]
_MAX_CONCURRENCY = 65_536
_MAX_POINTS = 64
_CLOSED_REQUESTS = 200
_MAX_REQUESTS = 1_000_000
# Over the mean rate: so far a bursty process may run ahead before the request limit ends it instead of the time.
_MAX_AHEAD = 4.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """`rate_per_s` and `concurrency` None: the trace's own times."""

    label: str
    rate_per_s: float | None = None
    concurrency: int | None = None


@dataclass(frozen=True, slots=True)
class Sweep:
    """Values of one parameter, each a run of its own."""

    key: _Swept
    values: tuple[float, ...]

    @classmethod
    def parse(cls, text: str) -> Sweep:
        """From the command line.

        Raises:
            ConfigError: another parameter, no values, or one that is not positive.
        """
        key, _, rest = text.partition("=")
        if key not in get_args(_Swept) or not rest:
            raise ConfigError(f"--sweep must be rate=1,2,4 or concurrency=1,8,32, got {text!r}")
        values = tuple(parse_number(value, f"--sweep {key}", above=0, at_most=1e6) for value in rest.split(","))
        if len(values) > _MAX_POINTS:
            raise ConfigError(f"--sweep takes at most {_MAX_POINTS} values, got {len(values)}")
        if key == "concurrency" and any(value != int(value) or value > _MAX_CONCURRENCY for value in values):
            raise ConfigError(f"--sweep concurrency takes whole numbers of at most {_MAX_CONCURRENCY}, got {rest}")
        return cls("rate" if key == "rate" else "concurrency", values)

    def points(self) -> list[Point]:
        """In the given order."""
        if self.key == "rate":
            return [Point(label=f"{value:g}/s", rate_per_s=value) for value in self.values]
        return [Point(label=f"{value:g} at once", concurrency=int(value)) for value in self.values]


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """As the command line gives it; texts are in the words of their modules. `trace` is a file's name."""

    rate_per_s: float | None = None
    concurrency: int | None = None
    sweep: str | None = None
    arrivals: str = "poisson"
    trace: str | None = None
    time_scale: float = 1.0
    length_scale: float = 1.0
    sessions: str | None = None
    classes: tuple[str, ...] = ()
    input: str = "256"
    output: str = "64"
    requests: int | None = None
    warm_up: int = 2
    duration_s: float = 60.0
    drain_s: float = 60.0
    timeout_s: float = 120.0
    max_in_flight: int = 2048
    retries: int = 0
    slo: str = ""
    send_slo: bool = False
    seed: int = 1
    vocabulary: int = 4000
    text: bool = False
    chat: bool = False
    temperature: float = 0.0
    ignore_eos: bool = True

    def __post_init__(self) -> None:
        if self.rate_per_s is not None and self.concurrency is not None:
            raise ConfigError("--rate and --concurrency exclude each other: an open loop or a closed one")
        if self.sweep and (self.rate_per_s is not None or self.concurrency is not None):
            raise ConfigError("--sweep takes the place of --rate and --concurrency")
        if self.sessions and self.trace:
            raise ConfigError("--sessions and --trace exclude each other: a trace has its own prompts")
        if self.vocabulary <= FIRST_TOKEN:
            raise ConfigError(f"--vocabulary must be above {FIRST_TOKEN}, got {self.vocabulary}")

    def check(self) -> None:
        """Read every text once, before anything is asked of a server.

        Raises:
            ConfigError: one that cannot be read.
        """
        self.workload(self.points()[0], trace=None, max_model_len=None)

    def points(self) -> list[Point]:
        """One for each value of the sweep; 8 at once where nothing is said.

        Raises:
            ConfigError: a sweep that cannot be read.
        """
        if self.sweep:
            return Sweep.parse(self.sweep).points()
        if self.rate_per_s is not None:
            return [Point(label=f"{self.rate_per_s:g}/s", rate_per_s=self.rate_per_s)]
        if self.concurrency is not None or not self.trace:
            concurrency = self.concurrency or 8
            return [Point(label=f"{concurrency} at once", concurrency=concurrency)]
        return [Point(label="trace")]

    def max_requests(self, point: Point) -> int:
        """As given; else 200 of a closed loop, and in an open one as many as the time can hold."""
        if self.requests is not None:
            return self.requests
        if point.concurrency is not None:
            return _CLOSED_REQUESTS
        if point.rate_per_s is None:
            return _MAX_REQUESTS
        return min(_MAX_REQUESTS, math.ceil(_MAX_AHEAD * point.rate_per_s * self.duration_s) + 10)

    @property
    def max_trace_rows(self) -> int:
        """Of the file; a closed loop may take all of them in turn."""
        return max(self.max_requests(point) for point in self.points())

    def slos(self) -> dict[str, Slo]:
        """Of each class, by name."""
        return {each.name: each.slo for each in self.load_classes()}

    def load_classes(self) -> tuple[LoadClass, ...]:
        """The mix.

        Raises:
            ConfigError: a class or a bound that cannot be read.
        """
        return parse_classes(self.classes, Slo.parse(self.slo))

    def workload(self, point: Point, *, trace: Sequence[TraceRow] | None, max_model_len: int | None) -> Workload:
        """What a point sends; `trace` holds the rows of the file.

        Raises:
            ConfigError: a text that cannot be read.
        """
        return Workload(
            requests=self.max_requests(point),
            input=Lengths.parse(self.input, "--input"),
            output=Lengths.parse(self.output, "--output"),
            is_open=point.concurrency is None,
            rate_per_s=point.rate_per_s,
            arrivals=ArrivalProcess.parse(self.arrivals),
            classes=self.load_classes(),
            sessions=SessionShape.parse(self.sessions) if self.sessions else None,
            trace=trace,
            time_scale=self.time_scale,
            length_scale=self.length_scale,
            max_model_len=max_model_len,
        )

    def point_seed(self, number: int) -> str:
        """Of a point: no two share prompts, so that no point finds the cache of the one before."""
        return f"{self.seed}/{number}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)
