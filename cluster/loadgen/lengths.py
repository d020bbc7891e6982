"""How long prompts and answers are, in tokens. Pure.

256                                        always
100-300                                    uniform, both ends included
lognormal:median=256,sigma=1,max=4096      many short ones and a few long ones, as people's requests are
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal

from baton.cluster.loadgen.option_text import parse_number, parse_numbers, split_name
from baton.errors import ConfigError

__all__ = ["Lengths"]

_MAX_TOKENS = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """A distribution over [low, high]; `median` and `sigma` (of the logarithm) belong to lognormal."""

    kind: Literal["fixed", "uniform", "lognormal"]
    low: int
    high: int
    median: float = 0.0
    sigma: float = 0.0

    @classmethod
    def parse(cls, text: str, option: str) -> Lengths:
        """From the command line.

        Raises:
            ConfigError: it is none of the three, or not positive.
        """
        name, rest = split_name(text)
        if name == "lognormal":
            known = {"median": 256.0, "sigma": 1.0, "max": float(_MAX_TOKENS)}
            values = parse_numbers(rest, f"{option} lognormal", known, at_most=_MAX_TOKENS)
            return cls(kind="lognormal", low=1, high=int(values["max"]), median=values["median"], sigma=values["sigma"])
        low, dash, high = text.partition("-")
        first = _tokens(low, option)
        last = _tokens(high, option) if dash else first
        if last < first:
            raise ConfigError(f"{option} must be N or LOW-HIGH, got {text!r}")
        return cls(kind="uniform" if dash else "fixed", low=first, high=last)

    def draw(self, generator: random.Random) -> int:
        """One length; takes the same amount of randomness whatever comes out."""
        if self.kind == "fixed":
            return self.low
        if self.kind == "uniform":
            return generator.randint(self.low, self.high)
        drawn = generator.lognormvariate(math.log(self.median), self.sigma)
        return min(max(round(drawn), self.low), self.high)


def _tokens(text: str, option: str) -> int:
    value = parse_number(text, option, above=0, at_most=_MAX_TOKENS)
    if value != int(value):
        raise ConfigError(f"{option} must be a whole number of tokens, N or LOW-HIGH, got {text!r}")
    return int(value)
