"""`baton top`: what every process of a running cluster does right now."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cluster.commands.options import KeyOption, NameOption

__all__ = ["top"]


def top(
    name: NameOption = "baton",
    interval_s: Annotated[
        float, typer.Option("--interval", "-i", min=0.1, max=3600, help="Seconds between tables; rates are over it.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one table, after one interval.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, a line for each table.")] = False,
    api_key: KeyOption = None,
) -> None:
    """Show requests, KV memory, tokens and transfers of every worker and router, live."""
    import asyncio
    import contextlib

    from baton.cluster.run_state import read_run_state
    from baton.cluster.top.live import show_top

    state = read_run_state(name)
    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(
            show_top(
                state.registry_address,
                api_key or state.api_key,
                name=name,
                interval_s=interval_s,
                once=once,
                as_json=as_json,
            )
        )
