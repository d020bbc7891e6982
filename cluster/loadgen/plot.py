"""A bench's result as a picture; needs matplotlib (extra `bench`).

One point: how the latencies are distributed, of all and of each class. A sweep: the same for each point, and below it
what the load did to throughput, latency, and what was refused or lost.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from baton.cluster.loadgen.result import PointResult, Result
from baton.cluster.loadgen.summary import CDF_POINTS, Summary
from baton.errors import ConfigError

__all__ = ["check_can_plot", "write_plot"]

_CDFS = (
    ("ttft_ms", "Time to first token"),
    ("tpot_ms", "Time per output token"),
    ("itl_ms", "Between chunks"),
    ("e2e_ms", "To the last token"),
)
_STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#d8dce2",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#8a929c",
    "text.color": "#22272e",
    "axes.labelcolor": "#22272e",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "lines.linewidth": 2.0,
    "legend.frameon": False,
    "legend.fontsize": 9,
}
# Distinct for most kinds of colour blindness (Okabe and Ito).
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#0072b2", "#e69f00", "#009e73", "#d55e00", "#57606a"
_CLASS_COLORS = (_BLUE, _ORANGE, _GREEN, "#cc79a7", "#56b4e9", _RED)


def check_can_plot() -> None:
    """Before anything is measured.

    Raises:
        ConfigError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise ConfigError("--plot needs matplotlib: pip install 'baton-serve[bench]'")


def write_plot(result: Result, path: Path) -> None:
    """Draw it into `path`, whose ending names the format."""
    check_can_plot()
    import matplotlib
    from matplotlib.figure import Figure

    is_sweep = len(result.points) > 1
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(14, 8) if is_sweep else (14, 4.2), layout="constrained")
        grid = figure.subplots(2 if is_sweep else 1, 4, squeeze=False)
        curves = _curves(result)
        for axes, (name, title) in zip(grid[0], _CDFS, strict=True):
            _draw_cdf(axes, name, title, curves)
        grid[0][0].set_ylabel("share of requests")
        _mark_slo(grid[0], result)
        lines, labels = grid[0][0].get_legend_handles_labels()
        if len(labels) > 1:
            # Beside the headline: curves fill their panels.
            figure.legend(lines, labels, loc="outside upper right", ncols=len(labels))
        if is_sweep:
            _draw_sweep(grid[1], result.points)
        figure.suptitle(_headline(result), x=0.01, ha="left", fontsize=10, color=_GREY)
        figure.savefig(path, dpi=130)


def _curves(result: Result) -> list[tuple[str, Summary, Any]]:
    """(name, summary, colour) of each line of the upper row."""
    points = result.points
    if len(points) > 1:
        import matplotlib

        colors = matplotlib.colormaps["viridis_r"]
        shades = [0.12 + 0.83 * number / (len(points) - 1) for number in range(len(points))]
        return [(point.label, point.summary, colors(at)) for point, at in zip(points, shades, strict=True)]
    only = points[0]
    if only.classes:
        return [
            (name, summary, _CLASS_COLORS[number % len(_CLASS_COLORS)])
            for number, (name, summary) in enumerate(only.classes.items())
        ]
    return [(only.label, only.summary, _BLUE)]


def _draw_cdf(axes: Any, name: str, title: str, curves: Sequence[tuple[str, Summary, Any]]) -> None:
    shares = [step / (CDF_POINTS - 1) for step in range(CDF_POINTS)]
    medians, least, most = [], float("inf"), 0.0
    for label, summary, color in curves:
        if (values := getattr(summary, name)) is not None:
            axes.plot(values.quantiles, shares, color=color, label=label)
            axes.plot([values.p50, values.p99], [0.5, 0.99], "o", color=color, markersize=4)
            medians.append(values.p50)
            least, most = min(least, values.quantiles[1]), max(most, values.max)
    # Latencies under load span decades; what is far below every median is next to nothing.
    if medians and 0 < 20 * min(medians) < most:
        axes.set_xscale("log")
        axes.set_xlim(left=max(least * 0.9, min(medians) / 20))
    else:
        axes.set_xlim(left=0)
    axes.set_ylim(0, 1.01)
    axes.set_title(title)
    axes.set_xlabel("ms")
    _plain_ticks(axes.xaxis)


def _plain_ticks(axis: Any) -> None:
    """1,000 and 0.1 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def _mark_slo(row: Sequence[Any], result: Result) -> None:
    from baton.cluster.loadgen.slo import Slo

    slo = Slo.parse(str(result.parameters.get("slo") or ""))
    for axes, bound in zip(row, (slo.ttft_ms, slo.tpot_ms, None, slo.e2e_ms), strict=True):
        if bound is not None:
            axes.axvline(bound, color=_RED, linestyle="--", linewidth=1.3, label="objective")


def _draw_sweep(row: Sequence[Any], points: Sequence[PointResult]) -> None:
    is_rate = points[0].rate_per_s is not None
    offered = [float(point.rate_per_s or point.concurrency or 0) for point in points]
    across = "requests offered per second" if is_rate else "requests at once"
    summaries = [point.summary for point in points]
    requests, tokens, first, lost = row

    def line(axes: Any, label: str, color: str, value_of: Callable[[Summary], float | None], style: str = "-") -> None:
        found = [(x, y) for x, summary in zip(offered, summaries, strict=True) if (y := value_of(summary)) is not None]
        if found:
            axes.plot(*zip(*found, strict=True), style, color=color, marker="o", markersize=4.5, label=label)

    if is_rate:
        most = max(offered)
        requests.plot([0, most], [0, most], ":", color=_GREY, linewidth=1.2, label="offered")
    line(requests, "answered", _BLUE, lambda summary: summary.requests_per_s)
    line(requests, "goodput", _GREEN, lambda summary: summary.goodput_per_s)
    requests.set_title("Requests per second")
    line(tokens, "output", _BLUE, lambda summary: summary.output_tokens_per_s)
    tokens.set_title("Output tokens per second")
    for name, color in (("TTFT", _BLUE), ("TPOT", _ORANGE)):
        for which, style in (("p50", "-"), ("p99", "--")):
            line(first, f"{name} {which}", color, _latency(f"{name.lower()}_ms", which), style)
    first.set_title("Latency, ms")
    first.set_yscale("log")
    _plain_ticks(first.yaxis)
    line(lost, "rejected", _ORANGE, lambda summary: 100 * summary.rejection_rate)
    line(lost, "aborted", _RED, lambda summary: 100 * summary.abort_rate)
    line(lost, "missed the objective", _GREY, lambda s: None if s.attainment is None else 100 * (1 - s.attainment))
    lost.set_title("Not served as asked, %")
    lost.set_ylim(-2, 102)
    for axes in row:
        axes.set_xlabel(across)
        axes.set_xlim(left=0)
        if axes is not first and axes is not lost:
            axes.set_ylim(bottom=0)
        if len(axes.get_legend_handles_labels()[0]) > 1:
            axes.legend(loc="best")


def _latency(name: str, which: str) -> Callable[[Summary], float | None]:
    return lambda summary: None if (values := getattr(summary, name)) is None else float(getattr(values, which))


def _headline(result: Result) -> str:
    about, parameters = result.about, result.parameters
    shape = (
        f"trace {Path(parameters['trace']).name}, lengths x {parameters['length_scale']:g}"
        if parameters.get("trace")
        else f"{parameters.get('input')} tokens in, {parameters.get('output')} out"
    )
    server, machine = about.get("server", {}), about.get("machine", {})
    return (
        f"{server.get('model', '')} over {server.get('kind', '')}, {shape}, seed {parameters.get('seed')}"
        f"  |  {machine.get('processor', '')}, {machine.get('cores', '?')} cores, {about.get('begun', '')[:10]}"
    )
