"""Conversations of several turns over shared system prompts. Pure.

    turns=4,system_prompts=4,system_tokens=256,think_s=1

A session draws one of the system prompts (Zipf: the second is half as frequent as the first, the third a third) and
asks its turns one after another; each turn's prompt holds all that was said before, the answers included. Before each
turn but the first its user thinks, exponentially long with this mean.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from baton.cluster.loadgen.option_text import parse_number, parse_numbers
from baton.errors import ConfigError

__all__ = ["SessionShape"]

_DEFAULTS = {"turns": 4.0, "system_prompts": 4.0, "system_tokens": 256.0}
_MAX = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionShape:
    """`system_tokens` of each system prompt; `think_s` in the mean."""

    turns: int
    system_prompts: int
    system_tokens: int
    think_s: float

    @classmethod
    def parse(cls, text: str) -> SessionShape:
        """From the command line.

        Raises:
            ConfigError: an unknown key, or a number that is not whole and positive (`think_s`: not negative).
        """
        parts = text.split(",")
        thinking = [part.strip() for part in parts if part.strip().startswith("think_s=")]
        others = ",".join(part for part in parts if part.strip() not in thinking)
        values = parse_numbers(others, "--sessions", {**_DEFAULTS}, at_most=_MAX)
        for key, value in values.items():
            if value != int(value):
                raise ConfigError(f"--sessions {key} must be a whole number, got {value:g}")
        think_s = 0.0
        for part in thinking:
            think_s = parse_number(part.removeprefix("think_s="), "--sessions think_s", above=-1e-9, at_most=_MAX)
        return cls(**{key: int(value) for key, value in values.items()}, think_s=max(0.0, think_s))

    def draw_system_prompt(self, generator: random.Random) -> int:
        """Which one, from 0."""
        return generator.choices(range(self.system_prompts), [1 / n for n in range(1, self.system_prompts + 1)])[0]

    def draw_think_s(self, generator: random.Random) -> float:
        """How long before a turn."""
        return generator.expovariate(1 / self.think_s) if self.think_s else 0.0
