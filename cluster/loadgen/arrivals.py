"""When the requests of an open loop are sent: arrival processes. Pure; a seed gives the same times again.

    constant                   one every 1/rate seconds
    poisson                    exponential gaps: arrivals that know nothing of one another
    gamma:cv=3                 gaps of a gamma distribution with this coefficient of variation; 1 is poisson
    bursts:on_s=5,off_s=15     poisson while on, nothing while off; both last exponentially long with these means

Each has the asked rate in the long run. Bursts begin on or off with the chances of the long run.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

from baton.cluster.loadgen.option_text import parse_numbers, split_name
from baton.errors import ConfigError

__all__ = ["ArrivalProcess", "times_s"]

_Kind = Literal["constant", "poisson", "gamma", "bursts"]
_MAX_CV = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class ArrivalProcess:
    """`cv` belongs to gamma, `on_s` and `off_s` to bursts."""

    kind: _Kind = "poisson"
    cv: float = 1.0
    on_s: float = 5.0
    off_s: float = 15.0

    @classmethod
    def parse(cls, text: str) -> ArrivalProcess:
        """From the command line.

        Raises:
            ConfigError: no such process, or a number out of range.
        """
        name, rest = split_name(text)
        option = f"--arrivals {name}"
        if name == "gamma":
            return cls(kind="gamma", cv=parse_numbers(rest, option, {"cv": 3.0}, at_most=_MAX_CV)["cv"])
        if name == "bursts":
            return cls(kind="bursts", **parse_numbers(rest, option, {"on_s": 5.0, "off_s": 15.0}))
        if name not in get_args(_Kind):
            raise ConfigError(f"--arrivals must be {', '.join(get_args(_Kind))}, got {name!r}")
        parse_numbers(rest, option, {})
        return cls(kind="constant" if name == "constant" else "poisson")


def times_s(process: ArrivalProcess, rate_per_s: float, seed: str) -> Iterator[float]:
    """Seconds since the begin, ascending, without an end."""
    assert rate_per_s > 0
    generator = random.Random(seed)
    if process.kind == "bursts":
        yield from _bursts_s(process, rate_per_s, generator)
        return
    # A gamma distribution of shape k and scale s has mean ks and a coefficient of variation of 1/sqrt(k).
    shape = process.cv**-2
    now_s = 0.0
    while True:
        match process.kind:
            case "constant":
                now_s += 1 / rate_per_s
            case "poisson":
                now_s += generator.expovariate(rate_per_s)
            case _:
                now_s += generator.gammavariate(shape, 1 / (shape * rate_per_s))
        yield now_s


def _bursts_s(process: ArrivalProcess, rate_per_s: float, generator: random.Random) -> Iterator[float]:
    """A Markov-modulated Poisson process of two states. Memoryless: an arrival behind a phase's end is drawn anew."""
    period_s = process.on_s + process.off_s
    peak_per_s = rate_per_s * period_s / process.on_s
    is_on = generator.random() < process.on_s / period_s
    now_s = 0.0
    while True:
        end_s = now_s + generator.expovariate(1 / (process.on_s if is_on else process.off_s))
        while is_on and (now_s := now_s + generator.expovariate(peak_per_s)) < end_s:
            yield now_s
        now_s, is_on = end_s, not is_on
