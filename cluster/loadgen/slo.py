"""Service level objectives: what a request must keep to count as good. Pure.

ttft_ms=300,tpot_ms=50
"""

from __future__ import annotations

from dataclasses import asdict, dataclass

from baton.cluster.loadgen.option_text import parse_number, parse_pairs

__all__ = ["Slo"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """Milliseconds that may not be exceeded; None bounds nothing."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    @classmethod
    def parse(cls, text: str, option: str = "--slo") -> Slo:
        """From the command line.

        Raises:
            ConfigError: an unknown key or a number that is not positive.
        """
        pairs = parse_pairs(text, option, dict.fromkeys(("ttft_ms", "tpot_ms", "e2e_ms")))
        return cls(**{key: parse_number(value, f"{option} {key}", above=0) for key, value in pairs.items()})

    def __bool__(self) -> bool:
        """Whether anything is bounded."""
        return any(value is not None for value in asdict(self).values())

    def over(self, other: Slo) -> Slo:
        """This one's bounds, and the other's where this has none."""
        mine = {key: value for key, value in asdict(self).items() if value is not None}
        return Slo(**{**asdict(other), **mine})

    def is_met(self, *, ttft_s: float, tpot_s: float | None, e2e_s: float) -> bool:
        """`tpot_s` is None for answers of a single token, which keep any bound on it."""
        seen = ((self.ttft_ms, ttft_s), (self.tpot_ms, tpot_s), (self.e2e_ms, e2e_s))
        return all(bound is None or value is None or value * 1e3 <= bound for bound, value in seen)

    def __str__(self) -> str:
        named = {key.removesuffix("_ms").upper(): value for key, value in asdict(self).items() if value is not None}
        return ", ".join(f"{name} <= {value:g} ms" for name, value in named.items())
