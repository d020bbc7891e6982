"""`baton up`: start a cluster, wait until it is ready, say where it is, and stop it in the end."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from baton.cluster.commands.options import ConfigOption, SetOption, load

__all__ = ["up"]


def up(
    config: ConfigOption = None,
    model: Annotated[str | None, typer.Option("--model", "-m", help="Shipped model, directory, or hub name.")] = None,
    launcher: Annotated[str | None, typer.Option("--launcher", help="auto, ray or local.")] = None,
    settings: SetOption = None,
    detach: Annotated[bool, typer.Option("--detach", "-d", help="Return once ready; `baton down` stops it.")] = False,
    insecure: Annotated[bool, typer.Option("--insecure", help="Listen beyond this machine without a key.")] = False,
    detached: Annotated[bool, typer.Option("--detached", hidden=True)] = False,
) -> None:
    """Start a cluster and serve until Ctrl-C. BATON_FAULTS holds fault rules to add to those of the configuration."""
    checked = load(config, settings, **{"model.path": model, "launcher": launcher, "insecure": insecure or None})
    if words := os.environ.get("BATON_FAULTS"):
        from baton.config import add_faults

        checked = add_faults(checked, words)
    if detach:
        from baton.cluster.detached import run_detached

        sys.exit(run_detached(checked, _own_arguments(config, model, launcher, settings, insecure)))

    import asyncio

    from baton.cluster.launchers.ray_environment import set_fork_environment

    set_fork_environment()
    from baton.cluster.foreground import run_foreground

    asyncio.run(run_foreground(checked, detached=detached))


def _own_arguments(
    config: Path | None, model: str | None, launcher: str | None, settings: list[str] | None, insecure: bool
) -> list[str]:
    """The command that `--detach` runs in the background."""
    options = [("--config", config), ("--model", model), ("--launcher", launcher)]
    options += [("--set", text) for text in settings or []]
    arguments = [part for flag, value in options if value is not None for part in (flag, str(value))]
    return ["up", "--detached", *arguments, *(["--insecure"] if insecure else [])]
