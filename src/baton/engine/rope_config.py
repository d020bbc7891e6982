"""The rotary embedding as a `config.json` describes it: a plain value, no torch.

transformers 4 wrote `rope_scaling` (null for default) beside `rope_theta`; 5 writes one `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from baton.errors import CheckpointError

__all__ = ["ROPE_TYPES", "RopeConfig", "parse_rope", "positive", "unsupported"]

ROPE_TYPES = ("default", "linear", "dynamic", "llama3")

_NEEDED_KEYS = {
    "default": frozenset[str](),
    "linear": frozenset({"factor"}),
    "dynamic": frozenset({"factor"}),
    "llama3": frozenset({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class RopeConfig:
    """Rotary embedding: how frequencies are scaled.

    Attributes:
        type: one of `ROPE_TYPES`.
        theta: base of the frequencies.
        factor: context extension; 1 for "default".
        low_freq_factor, high_freq_factor, original_max_position_embeddings: of "llama3" only.
    """

    type: str = "default"
    theta: float = 10000.0
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 1.0
    original_max_position_embeddings: int = 0


def unsupported(source: str, key: str, value: object, supported: str) -> CheckpointError:
    """The error for a key whose value Baton does not compute; `source` names the file."""
    return CheckpointError(f"{source}: {key} = {value!r} is not supported; supported: {supported}")


def positive(source: str, key: str, value: object) -> float:
    """`value` as a positive finite number.

    Raises:
        CheckpointError: it is none.
    """
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < float("inf"):
        raise unsupported(source, key, value, "a positive number")
    return float(value)


def parse_rope(data: Mapping[str, Any], source: str) -> RopeConfig:
    """Read the rotary embedding's keys of a `config.json`.

    Raises:
        CheckpointError: an unknown type, a missing or an unexpected parameter.
    """
    key = "rope_scaling" if data.get("rope_scaling") is not None else "rope_parameters"
    raw = data.get(key)
    if raw is not None and not isinstance(raw, dict):
        raise unsupported(source, key, raw, "an object with rope_type and rope_theta")
    parameters = dict(raw or {})
    rope_type = parameters.pop("rope_type", parameters.pop("type", "default"))
    parameters.pop("type", None)
    if rope_type not in ROPE_TYPES:
        raise unsupported(source, f"{key}.rope_type", rope_type, ", ".join(ROPE_TYPES))
    theta = parameters.pop("rope_theta", None)
    if theta is None:
        theta = data.get("rope_theta", 10000.0)
    partial = parameters.pop("partial_rotary_factor", None) or data.get("partial_rotary_factor") or 1.0
    if partial != 1.0:
        raise unsupported(source, "partial_rotary_factor", partial, "1.0 (all of head_dim is rotated)")
    attention_factor = parameters.pop("attention_factor", None)
    if attention_factor not in (None, 1, 1.0):
        raise unsupported(source, f"{key}.attention_factor", attention_factor, "1.0")
    return _parse_scaling(source, key, rope_type, positive(source, "rope_theta", theta), parameters)


def _parse_scaling(source: str, key: str, rope_type: str, theta: float, parameters: Mapping[str, Any]) -> RopeConfig:
    needed = _NEEDED_KEYS[rope_type]
    # Configs carry these two with other types as well, where transformers does not read them either.
    known = needed | {"original_max_position_embeddings", "factor"}
    extra = {name for name, value in parameters.items() if name not in known and value is not None}
    if extra:
        name = min(extra)
        raise unsupported(source, f"{key}.{name}", parameters[name], f"rope type {rope_type!r} with {sorted(needed)}")
    values = {}
    for name in sorted(needed):
        if parameters.get(name) is None:
            raise CheckpointError(f"{source}: {key}.{name} is missing; rope type {rope_type!r} needs it")
        values[name] = positive(source, f"{key}.{name}", parameters[name])
    if rope_type == "default":
        return RopeConfig(theta=theta)
    if values["factor"] < 1:
        raise unsupported(source, f"{key}.factor", values["factor"], "a number >= 1")
    if rope_type != "llama3":
        return RopeConfig(type=rope_type, theta=theta, factor=values["factor"])
    if values["high_freq_factor"] <= values["low_freq_factor"]:
        raise unsupported(source, f"{key}.high_freq_factor", values["high_freq_factor"], "a number > low_freq_factor")
    return RopeConfig(
        type=rope_type,
        theta=theta,
        factor=values["factor"],
        low_freq_factor=values["low_freq_factor"],
        high_freq_factor=values["high_freq_factor"],
        original_max_position_embeddings=int(values["original_max_position_embeddings"]),
    )
