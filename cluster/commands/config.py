"""`baton config show` and `baton config schema`."""

from __future__ import annotations

import typer

from baton.cluster.commands.options import ConfigOption, SetOption, load

__all__ = ["app"]

app = typer.Typer(help="Show settings and their schema.", no_args_is_help=True)


@app.command()
def show(config: ConfigOption = None, settings: SetOption = None) -> None:
    """Print every setting with what it means, as a complete cluster.yaml."""
    from baton.cluster.config_text import config_text

    typer.echo(config_text(load(config, settings)), nl=False)


@app.command()
def schema() -> None:
    """Print the JSON schema of cluster.yaml, for editors."""
    import json

    from baton.config import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))
