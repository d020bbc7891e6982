"""Whether processes grow: memory and descriptors over time, by least squares, and their bounds. Pure.

    a life (one process)      its first `WARM_UP_S` say nothing, and of what follows only the later half is looked at:
                              caches that fill and pools that spread level off by then, a leak does not
    a role (all its lives)    each life has a level of its own, and all have one slope: what is too little to be told
                              from the noise of one life, such as some KiB with each request, shows in all of them.
                              Where they give enough of it, only what is older than `SETTLED_S` is looked at: the later
                              half of a short life is still one that fills its caches

A process that was started anew is another one; lives that did not last long enough after their warm-up are left out.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Bounds", "Growth", "RoleGrowth", "Sample", "by_role", "excesses", "growths", "slope"]

WARM_UP_S = 20.0
SETTLED_S = 90.0
"""By then most of what a process fills is full; what most requests at once take comes later (docs/benchmarks.md)."""
_MIN_SPAN_S = 15.0
_MIN_SAMPLES = 8
_MAX_CHAINED = 0.98
MIN_ROLE_S = 120.0
"""Of looks, together, for a role to be judged by."""


@dataclass(frozen=True, slots=True)
class Sample:
    """One look at a process."""

    at_s: float
    resident_bytes: int
    descriptors: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """How a process grew after its warm-up.

    Attributes:
        span_s: from the end of the warm-up to the last look.
        first_bytes, last_bytes, first_descriptors, last_descriptors, max_descriptors: in that span.
        later: looks in its later half, in order.
        settled: looks at it when it was older than `SETTLED_S`, in order; empty where they are too few.
    """

    name: str
    pid: int
    span_s: float
    first_bytes: int
    last_bytes: int
    first_descriptors: int
    last_descriptors: int
    max_descriptors: int
    later: tuple[Sample, ...]
    settled: tuple[Sample, ...]

    @property
    def later_s(self) -> float:
        """How long the later half was."""
        return self.later[-1].at_s - self.later[0].at_s

    @property
    def slope_bytes_per_min(self) -> float:
        """Of memory in the later half."""
        return 60.0 * slope([(each.at_s, each.resident_bytes) for each in self.later])

    @property
    def descriptor_slope_per_min(self) -> float:
        """Likewise."""
        return 60.0 * slope([(each.at_s, each.descriptors) for each in self.later])

    @property
    def grown_bytes(self) -> float:
        """What the slope makes of the later half."""
        return self.slope_bytes_per_min * self.later_s / 60.0

    @property
    def grown_descriptors(self) -> float:
        """Likewise."""
        return self.descriptor_slope_per_min * self.later_s / 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class RoleGrowth:
    """How the processes of one role grew.

    Attributes:
        lives: of those that were looked at.
        looked_s: how long that was, in all.
        is_settled: whether that was when they were older than `SETTLED_S`; else the later halves of their lives.
        doubt_bytes_per_min: two standard errors of the slope: memory that comes and goes looks like growth for a while.
        doubt_descriptors_per_min: likewise.
    """

    role: str
    lives: int
    looked_s: float
    is_settled: bool
    slope_bytes_per_min: float
    doubt_bytes_per_min: float
    descriptor_slope_per_min: float
    doubt_descriptors_per_min: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much may grow: a process in its later half, a constant and so much a minute; and the slopes of a role.

    A role's slope has no constant, and is believed less its doubt: 1 MiB a minute is 2 KiB with each of nine requests a
    second.
    """

    bytes: float = 8.0 * 2**20
    bytes_per_min: float = 1.0 * 2**20
    descriptors: float = 16.0
    descriptors_per_min: float = 0.5
    role_bytes_per_min: float = 1.0 * 2**20
    role_descriptors_per_min: float = 1.0


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through `points` (x, y) with the least squares of errors in y; 0 where all x are one.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("a slope needs points, got none")
    return _common_slope([points])[0]


def _common_slope(lives: Sequence[Sequence[tuple[float, float]]]) -> tuple[float, float]:
    """Of parallel lines, one through the points of each life, and the standard error of that.

    One look is much like the next, so that many of them say less than as many independent ones: by as much as their
    errors hang together from each to the next.
    """
    product = spread = 0.0
    centred: list[list[tuple[float, float]]] = []
    for points in lives:
        mean_x = sum(x for x, _ in points) / len(points)
        mean_y = sum(y for _, y in points) / len(points)
        centred.append([(x - mean_x, y - mean_y) for x, y in points])
        product += sum(x * y for x, y in centred[-1])
        spread += sum(x * x for x, _ in centred[-1])
    if not spread:
        return 0.0, 0.0
    found = product / spread
    errors = [[y - found * x for x, y in points] for points in centred]
    squares = sum(error * error for of_life in errors for error in of_life)
    freedom = sum(map(len, errors)) - len(errors) - 1
    if not squares or freedom < 1:
        return found, 0.0
    chained = sum(first * second for of_life in errors for first, second in pairwise(of_life)) / squares
    chained = min(max(chained, 0.0), _MAX_CHAINED)
    return found, math.sqrt(squares / freedom / spread * (1 + chained) / (1 - chained))


def growths(samples: Mapping[tuple[str, int], Sequence[Sample]]) -> list[Growth]:
    """Of each (name, pid) that lived long enough, in order of names."""
    found = []
    for (name, pid), taken in sorted(samples.items()):
        warm = [sample for sample in taken if sample.at_s >= taken[0].at_s + WARM_UP_S]
        if not _if_enough(warm):
            continue
        middle_s = (warm[0].at_s + warm[-1].at_s) / 2
        found.append(
            Growth(
                name=name,
                pid=pid,
                span_s=warm[-1].at_s - warm[0].at_s,
                first_bytes=warm[0].resident_bytes,
                last_bytes=warm[-1].resident_bytes,
                first_descriptors=warm[0].descriptors,
                last_descriptors=warm[-1].descriptors,
                max_descriptors=max(each.descriptors for each in warm),
                later=tuple(each for each in warm if each.at_s >= middle_s),
                settled=_if_enough([each for each in warm if each.at_s >= taken[0].at_s + SETTLED_S]),
            )
        )
    return found


def _if_enough(looks: Sequence[Sample]) -> tuple[Sample, ...]:
    is_enough = len(looks) >= _MIN_SAMPLES and looks[-1].at_s - looks[0].at_s >= _MIN_SPAN_S
    return tuple(looks) if is_enough else ()


def by_role(found: Sequence[Growth]) -> list[RoleGrowth]:
    """Of each role of which there are lives, in order of names; "decode-1" is of the role "decode"."""
    roles: dict[str, list[Growth]] = {}
    for growth in found:
        roles.setdefault(growth.name.rpartition("-")[0] or growth.name, []).append(growth)
    return [_role_growth(role, lives) for role, lives in sorted(roles.items())]


def _role_growth(role: str, lives: Sequence[Growth]) -> RoleGrowth:
    looks = [life.settled for life in lives if life.settled]
    is_settled = _sum_s(looks) >= MIN_ROLE_S
    if not is_settled:
        looks = [life.later for life in lives]
    memory, memory_error = _common_slope([[(each.at_s, each.resident_bytes) for each in life] for life in looks])
    files, files_error = _common_slope([[(each.at_s, each.descriptors) for each in life] for life in looks])
    return RoleGrowth(
        role=role,
        lives=len(looks),
        looked_s=_sum_s(looks),
        is_settled=is_settled,
        slope_bytes_per_min=60.0 * memory,
        doubt_bytes_per_min=120.0 * memory_error,
        descriptor_slope_per_min=60.0 * files,
        doubt_descriptors_per_min=120.0 * files_error,
    )


def _sum_s(lives: Sequence[Sequence[Sample]]) -> float:
    return sum(looks[-1].at_s - looks[0].at_s for looks in lives)


def excesses(found: Sequence[Growth], bounds: Bounds) -> list[str]:
    """Who grew beyond the bounds, in words."""
    texts = []
    for growth in found:
        minutes = growth.later_s / 60.0
        limit_bytes = bounds.bytes + minutes * bounds.bytes_per_min
        if growth.grown_bytes > limit_bytes:
            texts.append(
                f"{growth.name} (pid {growth.pid}) grew by {growth.grown_bytes / 2**20:.1f} MiB"
                f" in the last {growth.later_s:.0f} s of its life, over {limit_bytes / 2**20:.1f} MiB"
            )
        limit = bounds.descriptors + minutes * bounds.descriptors_per_min
        if growth.grown_descriptors > limit:
            texts.append(
                f"{growth.name} (pid {growth.pid}) has {growth.grown_descriptors:.0f} descriptors more after the last"
                f" {growth.later_s:.0f} s of its life, over {limit:.0f}"
            )
    for role in by_role(found):
        if role.looked_s < MIN_ROLE_S:
            continue
        if role.slope_bytes_per_min - role.doubt_bytes_per_min > bounds.role_bytes_per_min:
            texts.append(
                f"{role.role}: {role.lives} lives grew by {role.slope_bytes_per_min / 2**20:.2f} MiB a minute,"
                f" over {bounds.role_bytes_per_min / 2**20:.2f} MiB"
            )
        if role.descriptor_slope_per_min - role.doubt_descriptors_per_min > bounds.role_descriptors_per_min:
            texts.append(
                f"{role.role}: {role.lives} lives took {role.descriptor_slope_per_min:.1f} descriptors a minute,"
                f" over {bounds.role_descriptors_per_min:.1f}"
            )
    return texts
