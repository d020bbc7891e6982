"""Whether processes grow: memory and descriptors over time, by least squares, and their bounds. Pure.

A process that was started anew is another one. What it takes while it warms up says nothing: samples of its first
`WARM_UP_S` are left out, and so are processes that did not live long enough after it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Bounds", "Growth", "Sample", "excesses", "growths", "slope"]

WARM_UP_S = 20.0
_MIN_SPAN_S = 15.0
_MIN_SAMPLES = 8


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
        slope_bytes_per_min: of its memory, by least squares.
        descriptor_slope_per_min: likewise.
        span_s: over which.
    """

    name: str
    pid: int
    span_s: float
    first_bytes: int
    last_bytes: int
    slope_bytes_per_min: float
    first_descriptors: int
    last_descriptors: int
    max_descriptors: int
    descriptor_slope_per_min: float

    @property
    def grown_bytes(self) -> float:
        """What the slope makes of the span."""
        return self.slope_bytes_per_min * self.span_s / 60.0

    @property
    def grown_descriptors(self) -> float:
        """Likewise."""
        return self.descriptor_slope_per_min * self.span_s / 60.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Bounds:
    """How much a process may grow: a constant, for caches that fill and pools that spread, and so much a minute.

    The sockets of a broken gRPC stream stay open until Python's cycle collector comes by: the constant allows for some.
    """

    bytes: float = 16.0 * 2**20
    bytes_per_min: float = 1.0 * 2**20
    descriptors: float = 64.0
    descriptors_per_min: float = 0.5


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the line through `points` (x, y) with the least squares of errors in y; 0 where all x are one.

    Raises:
        ValueError: no points.
    """
    if not points:
        raise ValueError("a slope needs points, got none")
    mean_x = sum(x for x, _ in points) / len(points)
    mean_y = sum(y for _, y in points) / len(points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


def growths(samples: Mapping[tuple[str, int], Sequence[Sample]]) -> list[Growth]:
    """Of each (name, pid) that lived long enough, in order of names."""
    found = []
    for (name, pid), taken in sorted(samples.items()):
        warm = [sample for sample in taken if sample.at_s >= taken[0].at_s + WARM_UP_S]
        if len(warm) < _MIN_SAMPLES or warm[-1].at_s - warm[0].at_s < _MIN_SPAN_S:
            continue
        found.append(
            Growth(
                name=name,
                pid=pid,
                span_s=warm[-1].at_s - warm[0].at_s,
                first_bytes=warm[0].resident_bytes,
                last_bytes=warm[-1].resident_bytes,
                slope_bytes_per_min=60.0 * slope([(each.at_s, each.resident_bytes) for each in warm]),
                first_descriptors=warm[0].descriptors,
                last_descriptors=warm[-1].descriptors,
                max_descriptors=max(each.descriptors for each in warm),
                descriptor_slope_per_min=60.0 * slope([(each.at_s, each.descriptors) for each in warm]),
            )
        )
    return found


def excesses(found: Sequence[Growth], bounds: Bounds) -> list[str]:
    """Who grew beyond the bounds, in words."""
    texts = []
    for growth in found:
        minutes = growth.span_s / 60.0
        limit_bytes = bounds.bytes + minutes * bounds.bytes_per_min
        if growth.grown_bytes > limit_bytes:
            texts.append(
                f"{growth.name} (pid {growth.pid}) grew by {growth.grown_bytes / 2**20:.1f} MiB"
                f" in {growth.span_s:.0f} s, over {limit_bytes / 2**20:.1f} MiB"
            )
        limit = bounds.descriptors + minutes * bounds.descriptors_per_min
        if growth.grown_descriptors > limit:
            texts.append(
                f"{growth.name} (pid {growth.pid}) has {growth.grown_descriptors:.0f} descriptors more after"
                f" {growth.span_s:.0f} s, over {limit:.0f}"
            )
    return texts
