"""What pydantic found wrong with a configuration, in the user's words: the key's path, and the nearest valid one."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any, get_args, get_origin

from pydantic import BaseModel, ValidationError

__all__ = ["explain"]

_SECRETS = ("api_key", "api_keys")


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One readable line for all that `error` found in a value of `root`; a secret is never in it."""
    return "; ".join(_explain(item, root) for item in error.errors())


def _explain(item: Any, root: type[BaseModel]) -> str:
    # Members of a union appear in the location as type names; what is left is the path in the file.
    location = [str(part) for part in item["loc"]]
    names = _known_path(root, location)
    path = ".".join(names)
    if item["type"] == "extra_forbidden":
        return _explain_unknown(root, names)
    message = str(item["msg"]).removeprefix("Value error, ")
    message = message[:1].lower() + message[1:] if message[:6] == "Input " else message
    if not path:
        return message
    told = item["type"] == "value_error" or not {*location}.isdisjoint(_SECRETS)
    given = "" if told else f", got {item['input']!r}"
    return f"{path}: {message}{given}"


def _explain_unknown(root: type[BaseModel], names: list[str]) -> str:
    *sections, key = names
    prefix = ".".join(sections)
    valid = list(_fields_at(root, sections))
    close = difflib.get_close_matches(key.replace("-", "_").lower(), valid, n=1, cutoff=0.6)
    if close:
        hint = f"did you mean {'.'.join([*sections, close[0]])}?"
    else:
        elsewhere = [path for path in _all_paths(root) if path.rpartition(".")[2] == key]
        hint = f"did you mean {elsewhere[0]}?" if elsewhere else f"valid keys: {', '.join(valid)}"
    return f"unknown key {'.'.join(names)}{f' in {prefix}' if prefix else ''}; {hint}"


def _known_path(root: type[BaseModel], location: list[str]) -> list[str]:
    """`location` up to and including its first part that is not a section."""
    for depth in range(len(location)):
        fields, is_named = _walk(root, location[: depth + 1])
        if not fields and not is_named:
            return location[: depth + 1]
    return location


def _fields_at(root: type[BaseModel], sections: list[str]) -> Mapping[str, Any]:
    return _walk(root, sections)[0]


def _walk(root: type[BaseModel], sections: list[str]) -> tuple[Mapping[str, Any], bool]:
    """The keys of a section, and whether its keys are names that the user chose."""
    model: type[BaseModel] | None = root
    is_named = False
    for section in sections:
        if is_named:
            is_named = False
            continue
        field = model.model_fields.get(section) if model is not None else None
        model = _section_type(field.annotation) if field is not None else None
        is_named = field is not None and get_origin(field.annotation) is Mapping
    return (model.model_fields if model is not None and not is_named else {}), is_named


def _section_type(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _all_paths(root: type[BaseModel]) -> list[str]:
    paths = []
    for name in root.model_fields:
        children = _fields_at(root, [name])
        paths += [f"{name}.{child}" for child in children] or [name]
    return paths
