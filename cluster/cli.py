"""`baton`: the command line. Only typer is imported here; each command imports what it needs when it runs."""

from __future__ import annotations

import sys

import typer

from baton.cluster.commands import bench, chaos, chat, config, doctor, down, replace, status, top, trace, up
from baton.errors import BatonError

__all__ = ["app", "main"]

app = typer.Typer(
    name="baton",
    help="Serve large language models from two pools of workers: one reads prompts, one writes answers.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command("up")(up.up)
app.command("down")(down.down)
app.command("status")(status.status)
app.command("top")(top.top)
app.command("trace")(trace.trace)
app.command("explain")(trace.explain)
app.command("drain")(replace.drain)
app.command("restart")(replace.restart)
app.command("chat")(chat.chat)
app.command("complete")(chat.complete)
app.command("bench")(bench.bench)
app.command("chaos")(chaos.chaos)
app.command("doctor")(doctor.doctor)
app.add_typer(config.app, name="config")


def main() -> None:
    """Entry point; an error on purpose is one line and exit code 1."""
    try:
        app()
    except BatonError as error:
        print(f"baton: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
