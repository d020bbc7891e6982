"""Classes of requests in a mix: who sends, how urgent, held to what. Pure.

    NAME:SHARE[:key=value,...]     gold:0.2:priority=10,ttft_ms=200      batch:0.8:tenant=b,input=1024

Shares are weights. Keys: priority, priority_class, tenant, cache_salt, input and output (lengths of their own),
ttft_ms, tpot_ms and e2e_ms (bounds of their own, over those of --slo).
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from baton.cluster.loadgen.lengths import Lengths
from baton.cluster.loadgen.option_text import parse_number, parse_pairs
from baton.cluster.loadgen.slo import Slo
from baton.errors import ConfigError

__all__ = ["DEFAULT_CLASS", "LoadClass", "draw_class", "parse_classes"]

_SLO_KEYS = ("ttft_ms", "tpot_ms", "e2e_ms")
_KEYS = dict.fromkeys(("priority", "priority_class", "tenant", "cache_salt", "input", "output", *_SLO_KEYS))


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadClass:
    """`tenant` is sent as X-Baton-Tenant and OpenAI's `user`; None leaves a field out, or lengths to the whole load."""

    name: str
    share: float = 1.0
    priority: int | None = None
    priority_class: str | None = None
    tenant: str | None = None
    cache_salt: str | None = None
    input: Lengths | None = None
    output: Lengths | None = None
    slo: Slo = field(default_factory=Slo)

    @classmethod
    def parse(cls, text: str) -> LoadClass:
        """From the command line.

        Raises:
            ConfigError: a part that cannot be read.
        """
        option = f"--class {text}"
        name, _, rest = text.partition(":")
        share, _, rest = rest.partition(":")
        if not name:
            raise ConfigError(f"{option} must be NAME:SHARE[:key=value,...]")
        pairs = parse_pairs(rest, option, _KEYS)
        bounds = {key: pairs.pop(key) for key in _SLO_KEYS if key in pairs}
        priority = pairs.get("priority")
        if priority is not None and not priority.removeprefix("-").isdecimal():
            raise ConfigError(f"{option}: priority must be a whole number, got {priority!r}")
        return cls(
            name=name,
            share=parse_number(share, f"{option}: share", above=0),
            priority=None if priority is None else int(priority),
            priority_class=pairs.get("priority_class"),
            tenant=pairs.get("tenant"),
            cache_salt=pairs.get("cache_salt"),
            input=Lengths.parse(pairs["input"], f"{option}: input") if "input" in pairs else None,
            output=Lengths.parse(pairs["output"], f"{option}: output") if "output" in pairs else None,
            slo=Slo.parse(",".join(f"{key}={value}" for key, value in bounds.items()), option),
        )


DEFAULT_CLASS = LoadClass(name="all")


def parse_classes(texts: Sequence[str], slo: Slo) -> tuple[LoadClass, ...]:
    """The mix, each class held to its own bounds and else to `slo`; one class of everything where none is given.

    Raises:
        ConfigError: a class that cannot be read, or two of a name.
    """
    classes = [LoadClass.parse(text) for text in texts] or [DEFAULT_CLASS]
    names = [each.name for each in classes]
    if len(set(names)) < len(names):
        raise ConfigError(f"--class names must differ, got {', '.join(names)}")
    return tuple(replace(each, slo=each.slo.over(slo)) for each in classes)


def draw_class(classes: Sequence[LoadClass], generator: random.Random) -> LoadClass:
    """One of them by their shares."""
    if len(classes) == 1:
        return classes[0]
    return generator.choices(classes, [each.share for each in classes])[0]
