"""A bench's result for people: tables on the terminal."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from rich import box
from rich.console import Console
from rich.table import Table

from baton.cluster.loadgen.result import PointResult, Result
from baton.cluster.loadgen.summary import LATENCIES, Distribution, Summary

__all__ = ["print_comparison", "print_result"]

_TITLES = {
    "ttft_ms": ("TTFT", "time to first token"),
    "tpot_ms": ("TPOT", "time per output token after it"),
    "itl_ms": ("ITL", "between chunks"),
    "e2e_ms": ("E2E", "to the last token"),
}
_PLAIN_WIDTH = 180


def print_result(result: Result, console: Console) -> None:
    """One point in full, or a row for each point of a sweep; then the classes, and what to know about the figures."""
    _widen(console)
    if len(result.points) == 1:
        _print_point(result.points[0], console)
    else:
        _print_rows("load", [(point.label, point.summary) for point in result.points], console)
    for point in result.points:
        if point.classes:
            title = "class" if len(result.points) == 1 else f"class, {point.label}"
            _print_rows(title, list(point.classes.items()), console)
    for point in result.points:
        prefix = f"{point.label}: " if len(result.points) > 1 else ""
        for text in point.warnings():
            _say(console, f"! {prefix}{text}")
        for text, count in point.errors.items():
            _say(console, f"  {prefix}{count} x {text}")
    if (seed := result.parameters.get("seed")) is not None:
        _say(console, f"Seed {seed}: --seed {seed} offers the same load again.")


def _print_point(point: PointResult, console: Console) -> None:
    summary = point.summary
    _say(console, _throughput_text(summary))
    if (text := _slo_text(summary)) is not None:
        _say(console, text)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("ms")
    for title in ("mean", "p50", "p90", "p95", "p99", "max"):
        table.add_column(title, justify="right")
    table.add_column("", style="dim")
    for name in LATENCIES:
        title, meaning = _TITLES[name]
        table.add_row(title, *_cells(getattr(summary, name)), meaning)
    console.print(table)
    lag = point.lag_ms
    late = f"sent {lag.p50:.1f} ms late at p50, {lag.p99:.1f} at p99; " if lag else ""
    _say(console, f"Generator: {late}{point.cpu_share:.0%} of a core.")


def _throughput_text(summary: Summary) -> str:
    cached = ""
    if summary.cached_tokens is not None and summary.input_tokens:
        cached = f" ({summary.cached_tokens / summary.input_tokens:.0%} of input cached)"
    return (
        f"{summary.ok} of {summary.requests} requests answered in {summary.duration_s:.1f} s:"
        f" {summary.requests_per_s:.2f} requests/s, {summary.input_tokens_per_s:,.0f} input and"
        f" {summary.output_tokens_per_s:,.0f} output tokens/s{cached}"
    )


def _slo_text(summary: Summary) -> str | None:
    aborted = f"{summary.rejection_rate:.1%} rejected ({summary.rejections} x 429), {summary.abort_rate:.1%} aborted"
    if summary.goodput_per_s is None or summary.attainment is None:
        return aborted if summary.ok < summary.requests else None
    return f"Goodput {summary.goodput_per_s:.2f} requests/s: {summary.attainment:.1%} kept the objective; {aborted}"


def _cells(values: Distribution | None) -> list[str]:
    if values is None:
        return [""] * 6
    row = (values.mean, values.p50, values.p90, values.p95, values.p99, values.max)
    return [_ms(value) for value in row]


def _ms(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def _pair(name: str) -> Callable[[Summary], str]:
    def cell(summary: Summary) -> str:
        values = getattr(summary, name)
        return "" if values is None else f"{_ms(values.p50)} / {_ms(values.p99)}"

    return cell


_COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("requests", lambda summary: str(summary.requests)),
    ("answered/s", lambda summary: f"{summary.requests_per_s:.2f}"),
    ("out tok/s", lambda summary: f"{summary.output_tokens_per_s:,.0f}"),
    ("TTFT p50 / p99", _pair("ttft_ms")),
    ("TPOT p50 / p99", _pair("tpot_ms")),
    ("ITL p50 / p99", _pair("itl_ms")),
    ("E2E p50 / p99", _pair("e2e_ms")),
    ("rejected", lambda summary: f"{summary.rejection_rate:.1%}"),
    ("aborted", lambda summary: f"{summary.abort_rate:.1%}"),
)
_SLO_COLUMNS: tuple[tuple[str, Callable[[Summary], str]], ...] = (
    ("goodput/s", lambda summary: "" if summary.goodput_per_s is None else f"{summary.goodput_per_s:.2f}"),
    ("in SLO", lambda summary: "" if summary.attainment is None else f"{summary.attainment:.1%}"),
)


def _print_rows(title: str, rows: Sequence[tuple[str, Summary]], console: Console) -> None:
    has_slo = any(summary.attainment is not None for _, summary in rows)
    columns = (*_COLUMNS, *(_SLO_COLUMNS if has_slo else ()))
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(title, no_wrap=True)
    for name, _ in columns:
        table.add_column(name, justify="right")
    for label, summary in rows:
        table.add_row(label, *(cell(summary) for _, cell in columns))
    console.print(table)


def _value(name: str, which: str) -> Callable[[Summary], float | None]:
    def value(summary: Summary) -> float | None:
        values = getattr(summary, name)
        return None if values is None else float(getattr(values, which))

    return value


_COMPARED: tuple[tuple[str, Callable[[Summary], float | None], bool], ...] = (
    ("requests/s", lambda summary: summary.requests_per_s, True),
    ("output tokens/s", lambda summary: summary.output_tokens_per_s, True),
    ("goodput/s", lambda summary: summary.goodput_per_s, True),
    ("in SLO", lambda summary: summary.attainment, True),
    *(
        (f"{_TITLES[name][0]} {which} ms", _value(name, which), False)
        for name in LATENCIES
        for which in ("mean", "p50", "p99")
    ),
    ("rejected", lambda summary: summary.rejection_rate, False),
    ("aborted", lambda summary: summary.abort_rate, False),
)


def print_comparison(first: Result, second: Result, names: tuple[str, str], console: Console) -> None:
    """Points of the same label, or the only ones, side by side; and the parameters that differ."""
    _widen(console)
    seconds = {point.label: point for point in second.points}
    are_single = len(first.points) == len(second.points) == 1
    for point in first.points:
        other = second.points[0] if are_single else seconds.pop(point.label, None)
        if other is None:
            _say(console, f"{point.label}: only in {names[0]}")
            continue
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title=point.label, title_justify="left")
        table.add_column("")
        for title in (*names, "second / first"):
            table.add_column(title, justify="right")
        for title, value_of, more_is_better in _COMPARED:
            values = value_of(point.summary), value_of(other.summary)
            if any(value is None for value in values) or not any(values):
                continue
            table.add_row(title, *(_figure(value) for value in values), _ratio(*values, more_is_better))
        console.print(table)
    for label in () if are_single else seconds:
        _say(console, f"{label}: only in {names[1]}")
    for key in sorted(first.parameters.keys() | second.parameters.keys()):
        values = first.parameters.get(key), second.parameters.get(key)
        if values[0] != values[1]:
            _say(console, f"! {key} differs: {values[0]} and {values[1]}")
    if first.about.get("machine") != second.about.get("machine"):
        _say(console, "! measured on different machines")


def _figure(value: float | None) -> str:
    assert value is not None
    return f"{value:,.0f}" if value >= 1000 else f"{value:.2f}"


def _ratio(first: float | None, second: float | None, more_is_better: bool) -> str:
    assert first is not None
    assert second is not None
    if not first:
        return ""
    ratio = second / first
    if 0.98 <= ratio <= 1.02:
        return f"{ratio:.2f}x"
    color = "green" if (ratio > 1) is more_is_better else "red"
    return f"[{color}]{ratio:.2f}x[/]"


def _widen(console: Console) -> None:
    """A file has no width: tables shall not be cut for it."""
    if not console.is_terminal:
        console.width = max(console.width, _PLAIN_WIDTH)


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
