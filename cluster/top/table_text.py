"""The table of `baton top` as text: aligned columns for scripts and logs, with bars and colours on a terminal. Pure."""

from __future__ import annotations

from baton.cluster.columns import columns
from baton.cluster.top.rows import Row, Table

__all__ = ["HEAD", "bar", "cells", "plain_text"]

HEAD = (
    "instance",
    "state",
    "queue",
    "run",
    "KV",
    "prompt/s",
    "tokens/s",
    "sent MB/s",
    "hits",
    "step ms",
    "slowness",
    "",
)
_BAR_CHARS = 8
_EIGHTHS = " ▏▎▍▌▋▊▉"
_HEALTH_WORDS = {"ejected": "set aside", "probing": "on trial"}
_NONE = "-"


def bar(share: float, width: int = _BAR_CHARS) -> str:
    """A bar of `width` characters, in steps of an eighth."""
    eighths = round(min(max(share, 0.0), 1.0) * width * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (_EIGHTHS[rest] if rest else "")).ljust(width)


def cells(row: Row, *, with_bar: bool = False) -> tuple[str, ...]:
    """One row, as `HEAD` says; what is not known is "-"."""
    kv = _NONE if row.kv_share is None else f"{row.kv_share:.0%}"
    if with_bar and row.kv_share is not None:
        kv = f"{bar(row.kv_share)} {kv:>4}"
    slowness = _NONE if row.slowness is None else f"{row.slowness:.1f}"
    return (
        row.instance,
        row.state,
        _count(row.waiting),
        _count(row.running),
        kv,
        _number(row.prompt_tokens_s, 0),
        _number(row.generated_tokens_s, 0),
        _number(None if row.sent_bytes_s is None else row.sent_bytes_s / 1e6, 2),
        _NONE if row.hit_share is None else f"{row.hit_share:.0%}",
        _number(None if row.step_s is None else row.step_s * 1e3, 1),
        slowness,
        ", ".join(filter(None, (_HEALTH_WORDS.get(row.health), "cache unknown" if row.is_stale else None))),
    )


def plain_text(table: Table) -> str:
    """Without colours and bars; numbers to the right."""
    lines = [HEAD, *(cells(row) for row in (*table.rows, table.total))]
    return "\n".join(columns(lines, left=2))


def _count(value: int | None) -> str:
    return _NONE if value is None else str(value)


def _number(value: float | None, digits: int) -> str:
    return _NONE if value is None else f"{value:,.{digits}f}"
