"""Options that several commands share, and the configuration they lead to."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from baton.config import ClusterConfig

__all__ = ["ConfigOption", "KeyOption", "NameOption", "SetOption", "load"]

ConfigOption = Annotated[
    Path | None, typer.Option("--config", "-c", help="cluster.yaml; without it every setting has its default.")
]
SetOption = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="One setting, for example prefill.replicas=2.")
]
KeyOption = Annotated[str | None, typer.Option("--api-key", envvar="BATON_API_KEY", help="Key of that server.")]
NameOption = Annotated[str, typer.Option("--name", "-n", help="Which cluster, when several run.")]


def load(config: Path | None, settings: list[str] | None, **overrides: Any) -> ClusterConfig:
    """The configuration of a file, `--set` options, and options of their own (None: not given).

    Raises:
        ConfigError: see `baton.config.load_config`.
    """
    from baton.config import load_config, parse_override

    given = {key: value for key, value in overrides.items() if value is not None}
    return load_config(config, dict(parse_override(text) for text in settings or []) | given)
