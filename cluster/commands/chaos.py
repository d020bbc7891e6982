"""`baton chaos`: break a running cluster on purpose, under load, and see which promises hold."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cluster.commands.options import NameOption

__all__ = ["chaos"]


def chaos(
    scenario: Annotated[str | None, typer.Argument(help="What to break; --list describes what there is.")] = None,
    name: NameOption = "baton",
    duration_s: Annotated[float, typer.Option("--duration", min=1, max=86_400, help="Seconds under load.")] = 20.0,
    clients: Annotated[int, typer.Option("--clients", min=1, max=256, help="Streams at a time.")] = 8,
    seed: Annotated[int, typer.Option("--seed", min=0, help="Of everything that is drawn.")] = 1,
    settle_s: Annotated[
        float, typer.Option("--settle", min=1, max=3600, help="Seconds for blocks to settle: transfer.lease_s + 1.")
    ] = 31.0,
    is_steady: Annotated[
        bool, typer.Option("--steady", help="One fault all along, instead of one after another; not for kills.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    list_scenarios: Annotated[bool, typer.Option("--list", help="Describe every scenario and end.")] = False,
) -> None:
    """Break a running cluster on purpose, under load; exit code 1 when a promise broke."""
    from baton.cluster.chaos.scenarios import SCENARIOS, find
    from baton.errors import ConfigError

    if list_scenarios:
        width = max(map(len, SCENARIOS))
        for each in SCENARIOS.values():
            typer.echo(f"{each.name:<{width}}  {each.description}")
        return
    if scenario is None:
        raise ConfigError("name a scenario; `baton chaos --list` describes them")
    chosen = find(scenario)

    import asyncio
    import json
    import sys

    from rich.console import Console

    from baton.cluster.chaos.report_text import render
    from baton.cluster.chaos.run import run_chaos
    from baton.cluster.run_state import read_run_state

    report = asyncio.run(
        run_chaos(
            read_run_state(name),
            chosen,
            duration_s=duration_s,
            clients=clients,
            seed=seed,
            settle_limit_s=settle_s,
            is_steady=is_steady,
            tell=lambda text: print(text, file=sys.stderr, flush=True),
        )
    )
    if as_json:
        typer.echo(json.dumps(report.as_dict(), indent=2))
    else:
        Console(width=None if sys.stdout.isatty() else 140).print(render(report))
    if report.broken:
        raise typer.Exit(1)
