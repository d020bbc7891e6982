"""What a comparison found, and three ways to show it: a table for terminals and Markdown, a JSON, a picture.

Comparison   measured rounds by (load, system), start-up times, failures, machine; to and from JSON
write_table  one row per load and system, medians over rounds, with ratios to the best peer
write_chart  throughput against latency, one line per system; needs matplotlib (extra `bench`)
"""

from __future__ import annotations

import importlib.util
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from load_figures import Figures, median
from standard_loads import Load

__all__ = ["Comparison", "write_chart", "write_table"]

_WIDTH = 190


@dataclass(kw_only=True)
class Comparison:
    """All of one comparison. `rounds[load][system]` grows by one row per round; what failed has none."""

    client: str
    machine: dict[str, Any]
    loads: list[Load]
    systems: dict[str, str]
    batons: list[str]
    rounds: dict[str, dict[str, list[Figures]]] = field(default_factory=dict)
    start_s: dict[str, list[float]] = field(default_factory=dict)
    busy: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)

    def add(self, load: str, system: str, figures: Figures) -> None:
        """One round of one load."""
        self.rounds.setdefault(load, {}).setdefault(system, []).append(figures)

    def medians(self) -> dict[str, dict[str, Figures]]:
        """By load and system, in the order of both."""
        return {
            load.name: {name: median(found[name]) for name in self.systems if name in found}
            for load in self.loads
            if (found := self.rounds.get(load.name, {}))
        }

    def to_json(self) -> str:
        """Everything, and the medians for whoever reads it."""
        medians = {load: {name: asdict(row) for name, row in rows.items()} for load, rows in self.medians().items()}
        return json.dumps({**asdict(self), "medians": medians}, indent=1) + "\n"

    @classmethod
    def from_json(cls, text: str) -> Comparison:
        """What `to_json` wrote."""
        values = json.loads(text)
        del values["medians"]
        values["loads"] = [Load(**load) for load in values["loads"]]
        values["rounds"] = {
            load: {name: [Figures(**row) for row in rows] for name, rows in found.items()}
            for load, found in values["rounds"].items()
        }
        return cls(**values)


def write_table(found: Comparison, console: Console | None = None) -> None:
    """Prints rows, start-up times, and what to know about them."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    medians = found.medians()
    table = Table(box=box.MARKDOWN)
    table.add_column("load")
    table.add_column("system")
    for title in (
        *("output tok/s", "min-max", "of best peer"),
        *("TTFT mean ms", "p50", "p99", "TPOT median ms"),
        *("ITL p50 ms", "p99", "of steadiest peer", "max", "rounds"),
    ):
        table.add_column(title, justify="right")
    for load, rows in medians.items():
        peers = [row for name, row in rows.items() if name not in found.batons]
        fastest = max((row.output_tokens_per_s for row in peers), default=0.0)
        steadiest = min((row.itl_p99_ms for row in peers), default=0.0)
        for name, row in rows.items():
            rates = [measured.output_tokens_per_s for measured in found.rounds[load][name]]
            table.add_row(
                load,
                name,
                f"{row.output_tokens_per_s:.1f}",
                f"{min(rates):.0f}-{max(rates):.0f}",
                _ratio(row.output_tokens_per_s, fastest),
                f"{row.ttft_mean_ms:.0f}",
                f"{row.ttft_p50_ms:.0f}",
                f"{row.ttft_p99_ms:.0f}",
                f"{row.tpot_median_ms:.1f}",
                f"{row.itl_p50_ms:.1f}",
                f"{row.itl_p99_ms:.1f}",
                _ratio(row.itl_p99_ms, steadiest),
                f"{row.itl_max_ms:.0f}",
                str(len(found.rounds[load][name])),
            )
    console.print(table)
    _write_notes(found, medians, console)


def _write_notes(found: Comparison, medians: dict[str, dict[str, Figures]], console: Console) -> None:
    def note(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    shapes = (f"{e.name} {e.requests} x {e.input_tokens} in / {e.output_tokens} out, {e.arrivals}" for e in found.loads)
    note(f"Medians of rounds. Client: {found.client}. Loads: {'; '.join(shapes)}.")
    note("Machine: " + ", ".join(f"{key} {value}" for key, value in found.machine.items()) + ".")
    starts = (f"{name} {statistics.median(values):.1f} s" for name, values in found.start_s.items() if values)
    if text := ", ".join(starts):
        note(f"Start until the first answer, median: {text}.")
    for name in found.systems:
        least = min((rows[name].chunks_per_token for rows in medians.values() if name in rows), default=1.0)
        if least < 0.95:
            note(f"{name} sent only {least:.2f} chunks per token: its ITL is between chunks, some of several tokens.")
    for text in (*found.busy, *found.failures):
        note(text)


def _ratio(value: float, base: float) -> str:
    return f"{value / base:.2f}x" if base else ""


def write_chart(found: Comparison, path: Path) -> bool:
    """Draws the picture; False, and none is drawn, without matplotlib."""
    if importlib.util.find_spec("matplotlib") is None:
        return False
    from matplotlib.figure import Figure

    medians = found.medians()
    closed = [load.name for load in found.loads if load.concurrency]
    opened = [load.name for load in found.loads if load.rate_per_s]
    figure = Figure(figsize=(12, 5.5), layout="constrained")
    panels: tuple[tuple[str, Callable[[Figures], float]], ...] = (
        ("TPOT, median, ms", lambda row: row.tpot_median_ms),
        ("inter-token latency, p99, ms", lambda row: row.itl_p99_ms),
    )
    for axes, (title, latency) in zip(figure.subplots(1, len(panels)), panels, strict=True):
        for index, name in enumerate(found.systems):
            color = f"C{index}"
            is_baton = name in found.batons
            rows = [(load, medians[load][name]) for load in closed if name in medians.get(load, {})]
            across = [row.output_tokens_per_s for _, row in rows]
            style = {"color": color, "linewidth": 2.5 if is_baton else 1.5, "linestyle": "-" if is_baton else "--"}
            axes.plot(across, [latency(row) for _, row in rows], marker="o", label=name, **style)
            for load in opened:
                if row := medians.get(load, {}).get(name):
                    rows.append((load, row))
                    hollow = {"marker": "D", "markerfacecolor": "none", "color": color, "linestyle": "none"}
                    axes.plot([row.output_tokens_per_s], [latency(row)], **hollow)
            for load, row in rows:
                place = (row.output_tokens_per_s, latency(row))
                axes.annotate(load, place, xytext=(4, 4), textcoords="offset points", fontsize=7, color=color)
        axes.set_xlabel("output tokens/s")
        axes.set_ylabel(title)
        axes.set_yscale("log")
        axes.margins(0.12)
        axes.grid(visible=True, which="both", alpha=0.25)
    figure.axes[0].legend(fontsize=8)
    figure.suptitle("Throughput against latency: right and low is better", fontsize=11)
    figure.savefig(path, dpi=150)
    return True
