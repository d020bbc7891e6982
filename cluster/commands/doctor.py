"""`baton doctor`: check what a start needs, and say how to fix what is missing."""

from __future__ import annotations

import typer

from baton.cluster.commands.options import ConfigOption, SetOption, load

__all__ = ["doctor"]


def doctor(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Check everything a first start trips over; exit code 1 when something must be fixed."""
    from baton.cluster.checks import run_checks

    failed = 0
    for check in run_checks(load(config, settings)):
        mark = "ok  " if check.ok else "warn" if check.warning else "FAIL"
        typer.echo(f"{mark}  {check.name:<14} {check.detail}")
        if not check.ok:
            typer.echo(f"      {'':<14} fix: {check.fix}")
            failed += not check.warning
    if failed:
        raise typer.Exit(1)
