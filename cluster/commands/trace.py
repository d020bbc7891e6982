"""`baton trace` and `baton explain`: what became of one request, and why it went where it went."""

from __future__ import annotations

from typing import Annotated

import typer

from baton.cluster.commands.options import KeyOption, NameOption

__all__ = ["explain", "trace"]

RequestArgument = Annotated[
    str, typer.Argument(metavar="REQUEST_ID", help="X-Request-Id of the answer, or the unique id of one choice.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON, as each router that knows the request told it.")]


def trace(
    request_id: RequestArgument, name: NameOption = "baton", as_json: JsonOption = False, api_key: KeyOption = None
) -> None:
    """Show where the time of a request went: queue, prefill, transfer, attempts, stream."""
    import shutil

    from baton.cluster.admin_client import find_request
    from baton.cluster.trace_text import trace_lines

    found = find_request(name, "trace", request_id, api_key)
    found.sort(key=lambda answer: answer["arrived_unix_s"])
    if as_json:
        _print_json(found)
        return

    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, soft_wrap=True)
    for place, answer in enumerate(found):
        if place:
            console.print()
        for line in trace_lines(answer, width=shutil.get_terminal_size().columns - 1):
            text = Text(line.text)
            if line.bar_at >= 0:
                text.stylize(line.style, line.bar_at)
            console.print(text)


def explain(
    request_id: RequestArgument, name: NameOption = "baton", as_json: JsonOption = False, api_key: KeyOption = None
) -> None:
    """Show why a request went where it went: candidates, scores, and whether its prompt was handed over."""
    from baton.cluster.admin_client import find_request
    from baton.cluster.explain_text import explain_text

    found = find_request(name, "explain", request_id, api_key)
    if as_json:
        _print_json(found)
        return
    typer.echo("\n\n".join(map(explain_text, found)))


def _print_json(found: object) -> None:
    import json

    typer.echo(json.dumps(found, indent=2))
