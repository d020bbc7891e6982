"""A report for people: what happened, fault by fault, and what it cost."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from baton.cluster.chaos.report import Report

__all__ = ["render"]

_MAX_ERRORS = 8
_MAX_STRIKES = 40


def render(report: Report) -> RenderableType:
    """Tables of strikes and of figures, errors, and the verdict."""
    parts: list[RenderableType] = [_strikes(report), _figures(report)]
    parts += [Text(f"failed {count} times: {error}") for error, count in list(report.errors.items())[:_MAX_ERRORS]]
    if report.broken:
        parts += [Text(f"BROKEN: {text}", style="bold red") for text in report.broken]
    else:
        parts.append(Text("every promise was kept", style="bold green"))
    return Group(*parts)


def _strikes(report: Report) -> Table:
    table = Table(title=f"{report.title}: {len(report.strikes)} faults in {report.duration_s:.0f} s")
    for column, justify in (("at s", "right"), ("fault", "left"), ("hit", "left"), ("ready again after s", "right")):
        table.add_column(column, justify=justify)  # type: ignore[arg-type]
    table.add_column("what was done", overflow="fold")
    if len(report.strikes) > _MAX_STRIKES:
        table.caption = f"the last {_MAX_STRIKES}; --json has all"
    for strike, again_s in report.strikes[-_MAX_STRIKES:]:
        again = ("not seen" if again_s is None else f"{again_s:.1f}") if strike.instance_id else ""
        table.add_row(f"{strike.began_s:.1f}", strike.scenario, strike.instance_id, again, strike.note)
    return table


def _figures(report: Report) -> Table:
    table = Table(title=f"{report.requests} requests of {report.clients or 'many'} clients", show_header=False)
    table.add_column("what")
    table.add_column("how much", justify="right")
    waits_s = report.wait_p50_s, report.wait_p99_s, report.wait_max_s, report.undisturbed_wait_s
    again_s = report.ready_again_max_s
    rows = [
        ("failed", str(report.failed)),
        ("wrong tokens", str(report.wrong)),
        ("resumed elsewhere", str(report.resumed)),
        ("sent again by the client", str(report.reconnected)),
        ("refused for a while", str(report.refused)),
        ("longest wait of a stream: p50, p99, max", " ".join(f"{1000 * wait_s:.0f}" for wait_s in waits_s[:3]) + " ms"),
        ("  of the longest, when", ", ".join(f"{each.waited_at_s:.0f} s" for each in report.longest)),
        ("  and before the faults", f"{1000 * waits_s[3]:.0f} ms"),
        ("ready again, longest", "" if again_s is None else f"{again_s:.1f} s"),
        ("blocks owned after", ", ".join(f"{name} {count}" for name, count in report.owned.items())),
        ("  all settled after", "not" if report.settle_s is None else f"{report.settle_s:.1f} s"),
    ]
    if report.left:
        rows.insert(0, ("clients that left", str(report.left)))
    for row in rows:
        table.add_row(*row)
    return table
