"""The small language of the load generator's options: `NAME:key=value,key=value`. Pure.

Every mistake is a `ConfigError` that names the option, what is allowed and what was given.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from baton.errors import ConfigError

__all__ = ["parse_number", "parse_numbers", "parse_pairs", "split_name"]


def split_name(text: str) -> tuple[str, str]:
    """ "gamma:cv=3" -> ("gamma", "cv=3"); "poisson" -> ("poisson", "")."""
    name, _, rest = text.partition(":")
    return name.strip(), rest.strip()


def parse_pairs(text: str, option: str, known: Mapping[str, object]) -> dict[str, str]:
    """ "a=1,b=2" -> {"a": "1", "b": "2"}; keys must be among `known`.

    Raises:
        ConfigError: an unknown or repeated key, or no `=`.
    """
    pairs: dict[str, str] = {}
    for part in text.split(",") if text else ():
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not equals or not value:
            raise ConfigError(f"{option}: {part!r} must be key=value; keys are {', '.join(known)}")
        if key not in known:
            raise ConfigError(f"{option}: unknown key {key!r}; keys are {', '.join(known)}")
        if key in pairs:
            raise ConfigError(f"{option}: {key} is given twice")
        pairs[key] = value
    return pairs


def parse_number(text: str, option: str, *, above: float = -math.inf, at_most: float = math.inf) -> float:
    """A finite number greater than `above`.

    Raises:
        ConfigError: it is none, or out of range.
    """
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (math.isfinite(value) and above < value <= at_most):
        limits = "" if math.isinf(above) else f" above {above:g}"
        limits += "" if math.isinf(at_most) else f" and at most {at_most:g}"
        raise ConfigError(f"{option} must be a number{limits}, got {text!r}")
    return value


def parse_numbers(
    text: str, option: str, known: Mapping[str, float], *, above: float = 0.0, at_most: float = 1e9
) -> dict[str, float]:
    """Pairs of numbers above `above`; what is not given has the default that `known` names.

    Raises:
        ConfigError: as of `parse_pairs` and `parse_number`.
    """
    pairs = parse_pairs(text, option, known)
    given = {key: parse_number(value, f"{option} {key}", above=above, at_most=at_most) for key, value in pairs.items()}
    return {**known, **given}
