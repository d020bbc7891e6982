"""`baton chat` and `baton complete`: talk to a running cluster from the terminal."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from baton.cluster.commands.options import KeyOption, NameOption

__all__ = ["chat", "complete"]

MaxTokensOption = Annotated[int, typer.Option("--max-tokens", min=1, help="Most tokens of one answer.")]
TemperatureOption = Annotated[float, typer.Option("--temperature", "-t", min=0, max=2, help="0 is greedy.")]
SeedOption = Annotated[int | None, typer.Option("--seed", help="Same seed, same answer.")]
UrlOption = Annotated[str | None, typer.Option("--url", help="Server; without it the cluster that runs here.")]
VerboseOption = Annotated[
    bool, typer.Option("--verbose", "-v", help="Tell each answer's request id, for `baton trace` and `baton explain`.")
]
ModelOption = Annotated[str | None, typer.Option("--model", help="Model name, when the server has several.")]


def chat(
    name: NameOption = "baton",
    message: Annotated[str | None, typer.Option("--message", "-m", help="Say this, print the answer, end.")] = None,
    system: Annotated[str | None, typer.Option("--system", help="System message.")] = None,
    max_tokens: MaxTokensOption = 256,
    temperature: TemperatureOption = 0.7,
    seed: SeedOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    model: ModelOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Chat; /reset starts over, /exit ends, Ctrl-C stops an answer."""
    from baton.cluster.session import ChatSession, Server

    server = Server.find(name, url, api_key, model)
    session = ChatSession(
        server, system=system, max_tokens=max_tokens, temperature=temperature, seed=seed, verbose=verbose
    )
    if message is not None:
        session.say(message)
        return
    interactive = sys.stdin.isatty()
    if interactive:
        typer.echo(f"{server.model} at {server.url}; /reset starts over, /exit ends")
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if text == "/exit":
            return
        if text == "/reset":
            session.reset()
        elif text:
            session.say(text)


def complete(
    prompt: Annotated[str, typer.Argument(help="Text to continue; - reads standard input.")],
    name: NameOption = "baton",
    max_tokens: MaxTokensOption = 128,
    temperature: TemperatureOption = 0.0,
    seed: SeedOption = None,
    url: UrlOption = None,
    api_key: KeyOption = None,
    model: ModelOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Continue a text."""
    from baton.cluster.session import Server, complete_text

    text = sys.stdin.read() if prompt == "-" else prompt
    complete_text(
        Server.find(name, url, api_key, model),
        text,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        verbose=verbose,
    )
