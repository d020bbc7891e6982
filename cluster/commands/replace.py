"""`baton drain` and `baton restart`: take instances of a running cluster away, or replace them."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cluster.commands.options import NameOption

__all__ = ["drain", "restart"]


def drain(
    instance: Annotated[str, typer.Argument(help="For example decode-1; `baton status` lists them.")],
    name: NameOption = "baton",
) -> None:
    """Take an instance away: it gets nothing new, and what runs ends or goes on elsewhere."""
    from baton.cluster.replace import drain as drain_instance
    from baton.cluster.run_state import read_run_state

    typer.echo(f"draining {instance}")
    drain_instance(read_run_state(name).registry_address, instance)
    typer.echo(f"{instance} is away; `baton restart {instance}` brings it back")


def restart(
    instances: Annotated[list[str] | None, typer.Argument(help="All workers, if none is named.")] = None,
    rolling: Annotated[
        bool, typer.Option("--rolling", help="One after another: the next one when the last one is ready again.")
    ] = False,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Seconds until an instance must be ready.")] = 300.0,
    name: NameOption = "baton",
) -> None:
    """Replace instances by fresh processes. Streams go on elsewhere, or wait for the instance to be back."""
    from baton.cluster import replace
    from baton.cluster.run_state import read_run_state

    address = read_run_state(name).registry_address
    wanted = replace.restartable(address, instances or [])
    replace.restart(address, wanted, rolling=rolling, ready_timeout_s=timeout_s, tell=typer.echo)
