"""A configuration as a commented `cluster.yaml`: every key, its value, and what it means."""

from __future__ import annotations

from collections.abc import Mapping

import yaml
from pydantic import BaseModel

from baton.config import ClusterConfig

__all__ = ["config_text"]

_COMMENT_COLUMN = 44
_HIDDEN = "********"


def config_text(config: ClusterConfig) -> str:
    """YAML that loads to `config` again, except that an API key and the password of a Redis are hidden."""
    return "\n".join(_lines(config, "")) + "\n"


def _lines(section: BaseModel, indent: str) -> list[str]:
    lines = []
    for key, field in type(section).model_fields.items():
        value = getattr(section, key)
        if isinstance(value, BaseModel):
            about = f"{indent}# {(type(value).__doc__ or '').strip()}"
            lines += [*([] if indent else [""]), about, f"{indent}{key}:", *_lines(value, f"{indent}  ")]
            continue
        if isinstance(value, Mapping) and value:
            lines += [f"{indent}# {field.description}", f"{indent}{key}:"]
            for name, child in value.items():
                lines += [f"{indent}  {name}:", *_lines(child, f"{indent}    ")]
            continue
        shown = _HIDDEN if key == "api_key" and value is not None else value
        if key == "api_keys":
            shown = [f"{_HIDDEN}{number}" for number in range(len(value))]
        elif isinstance(value, Mapping):
            shown = {}
        if key == "state" and "@" in value:
            shown = value.replace(value[value.index("://") + 3 : value.rindex("@")], _HIDDEN)
        text = yaml.safe_dump(shown, default_flow_style=True, width=1000).removesuffix("...\n").strip()
        lines.append(f"{f'{indent}{key}: {text}':<{_COMMENT_COLUMN}}# {field.description or ''}".rstrip(" #"))
    return lines
