"""What `/admin/trace/` tells, for people: a bar over time for each stretch of a request's life. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.cluster.columns import columns

__all__ = ["Line", "trace_lines"]

_OUTER = ("queue", "route", "attempt", "pause", "stream")
"""Spans that follow one another; the others are phases of an attempt."""
_STYLES = {
    "queue": "yellow",
    "prefill_queue": "yellow",
    "pause": "red",
    "prefill": "cyan",
    "transfer": "magenta",
    "first_step": "green",
    "stream": "green",
}
_MIN_BAR_CHARS = 20
_ROUTER = "router"


@dataclass(frozen=True, slots=True)
class Line:
    """One line; `bar_at` is where its bar begins, to be drawn in `style`; -1: it has none."""

    text: str
    bar_at: int = -1
    style: str = ""


def trace_lines(answer: Mapping[str, Any], *, width: int) -> list[Line]:
    """One request of one router, all choices.

    Args:
        width: characters of a line.
    """
    trace = f", trace {answer['trace_id']}" if answer.get("trace_id") else ""
    lines = [Line(f"request {answer['request_id']} on {answer.get('router', _ROUTER)}{trace}")]
    for choice in answer["choices"]:
        lines += [Line(""), Line(_summary(choice)), *_waterfall(choice, str(answer.get("router", _ROUTER)), width)]
    return lines


def _summary(choice: Mapping[str, Any]) -> str:
    prefill, decode = choice.get("prefill_instance"), choice.get("decode_instance")
    parts = [f"choice {choice['choice']}", choice["outcome"] or "in work"]
    if decode:
        parts.append(f"{prefill} -> {decode}" if prefill and prefill != decode else f"{decode} alone")
    parts.append(f"{choice['prompt_tokens']:,} prompt tokens ({choice['cached_tokens']:,} cached)")
    parts.append(f"{choice['completion_tokens']:,} written")
    ttft_s, duration_s, written = choice.get("ttft_s"), choice.get("duration_s"), choice["completion_tokens"]
    if ttft_s is not None:
        parts.append(f"first token {_ms(ttft_s)} ms")
    if duration_s is not None:
        parts.append(f"all {_ms(duration_s)} ms")
    if ttft_s is not None and duration_s is not None and written > 1 and duration_s > ttft_s:
        parts.append(f"{(written - 1) / (duration_s - ttft_s):,.0f} tokens/s")
    said = ", ".join(parts)
    return f"{said}: {choice['error']}" if choice.get("error") else said


def _waterfall(choice: Mapping[str, Any], router: str, width: int) -> Iterator[Line]:
    spans: Sequence[Mapping[str, Any]] = sorted(choice["spans"], key=_order)
    if not spans:
        yield Line("  no span is known yet")
        return
    end_s = max(max(span["start_s"] + span["duration_s"] for span in spans), choice.get("duration_s") or 0.0, 1e-9)
    rows = [("", "where", "at ms", "took ms")]
    rows += [(_label(s), s["where"] or router, _ms(s["start_s"]), _ms(s["duration_s"])) for s in spans]
    head, *lines = columns(rows, left=2)
    bar_at = len(head) + 4
    bar_chars = max(width - bar_at, _MIN_BAR_CHARS)
    yield Line(f"  {head}  0{_ms(end_s):>{bar_chars - 1}}")
    for span, line in zip(spans, lines, strict=True):
        start = min(int(span["start_s"] / end_s * bar_chars), bar_chars - 1)
        stop = min(max(round((span["start_s"] + span["duration_s"]) / end_s * bar_chars), start + 1), bar_chars)
        mark = "─" if span["name"] == "attempt" else "█"
        yield Line(f"  {line}  {' ' * start}{mark * (stop - start)}", bar_at, _STYLES.get(span["name"], ""))
    if choice.get("is_truncated"):
        yield Line("  more happened than is kept: later spans are missing")


def _order(span: Mapping[str, Any]) -> tuple[float, bool]:
    # What contains others comes before them where both begin at once.
    return span["start_s"], span["name"] not in _OUTER


def _label(span: Mapping[str, Any]) -> str:
    name = span["name"]
    if name == "attempt":
        return f"attempt {span['attempt']}"
    return name if name in _OUTER else f"  {name.replace('_', ' ')}"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:,.1f}"
