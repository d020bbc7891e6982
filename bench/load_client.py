"""Our own client: sends a load to an OpenAI-compatible URL over /v1/completions and notes when each chunk comes.

    describe(url)            -> Server   what the server calls its model, and whether it takes token ids as prompt
    run_load(server, ...)    -> Run

A failed request, or an answer of another length than asked, ends the load with a `LoadError`.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import httpx

from load_figures import Run, Stream
from standard_loads import FIRST_TOKEN, Load

__all__ = ["LoadError", "Server", "describe", "run_load"]

REQUEST_TIMEOUT_S = 600.0
_PROBE = tuple(range(FIRST_TOKEN, FIRST_TOKEN + 8))


class LoadError(RuntimeError):
    """A server did not serve what was asked; the text names it."""


@dataclass(frozen=True, slots=True)
class Server:
    """A server that answers. `url` has no /v1.

    `counts_apart`: a stream's token count comes in a chunk of its own, as the API says, and not with the last token.
    """

    url: str
    model: str
    takes_token_ids: bool
    counts_apart: bool


def describe(url: str) -> Server:
    """Asks for the model and for a few tokens.

    Raises:
        httpx.HTTPError: the server cannot be reached, or answers with an error: it may still be starting.
        LoadError: it answers, but not as an OpenAI-compatible server does.
    """
    with httpx.Client(base_url=url, timeout=REQUEST_TIMEOUT_S, trust_env=False) as client:
        listed = client.get("/v1/models").raise_for_status().json()
        try:
            model = str(listed["data"][0]["id"])
        except (KeyError, IndexError, TypeError) as error:
            raise LoadError(f"{url}/v1/models names no model: {str(listed)[:200]}") from error
        takes_token_ids = _takes_token_ids(client, model)
        streamed = _body(model, list(_PROBE) if takes_token_ids else "a", 2)
        response = client.post("/v1/completions", json=streamed).raise_for_status()
        chunks = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
        return Server(url, model, takes_token_ids, any(c.get("usage") and not c.get("choices") for c in chunks))


def _takes_token_ids(client: httpx.Client, model: str) -> bool:
    body = {"model": model, "prompt": list(_PROBE), "max_tokens": 1, "temperature": 0}
    response = client.post("/v1/completions", json=body)
    if response.is_server_error:
        response.raise_for_status()
    counted = response.json().get("usage", {}).get("prompt_tokens") if response.is_success else None
    # Some add a token that begins every text, even to ids.
    return counted is not None and counted - len(_PROBE) in (0, 1)


def _body(model: str, prompt: list[int] | str, output_tokens: int) -> dict[str, Any]:
    return {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,  # a chunk for every token, also where its text must wait for the next one
        "stream": True,
        "stream_options": {"include_usage": True},
    }


async def run_load(
    server: Server, load: Load, prompts: Sequence[list[int] | str], arrivals_s: Sequence[float] | None = None
) -> Run:
    """Sends one request for each prompt, `load.concurrency` at a time or at `arrivals_s`.

    Raises:
        LoadError: a request failed or gave another number of tokens than `load.output_tokens`.
    """
    assert (load.concurrency is None) == (arrivals_s is not None)
    most = load.concurrency or len(prompts)
    # A connection for each request: some servers close idle ones at the very moment they are used again.
    limits = httpx.Limits(max_connections=most, max_keepalive_connections=0)
    streams: list[Stream] = []
    waiting = list(reversed(prompts))

    async with httpx.AsyncClient(
        base_url=server.url, timeout=REQUEST_TIMEOUT_S, limits=limits, trust_env=False
    ) as client:

        async def one_after_another() -> None:
            while waiting:
                streams.append(await _stream(client, server, load, waiting.pop()))

        async def at(due_s: float, prompt: list[int] | str) -> None:
            await asyncio.sleep(due_s - time.perf_counter())
            streams.append(await _stream(client, server, load, prompt))

        begin_s = time.perf_counter()
        try:
            async with asyncio.TaskGroup() as tasks:
                if arrivals_s is None:
                    for _ in range(most):
                        tasks.create_task(one_after_another())
                else:
                    for prompt, arrival_s in zip(prompts, arrivals_s, strict=True):
                        tasks.create_task(at(begin_s + arrival_s, prompt))
        except* (httpx.HTTPError, LoadError) as errors:
            first = errors.exceptions[0]
            raise LoadError(f"{server.url}, load {load.name}: {type(first).__name__}: {first}") from first
    return Run(streams, time.perf_counter() - begin_s)


async def _stream(client: httpx.AsyncClient, server: Server, load: Load, prompt: list[int] | str) -> Stream:
    body = _body(server.model, prompt, load.output_tokens)
    usage: dict[str, Any] = {}
    at_s: list[float] = []
    begin_s = end_s = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as response:
        if not response.is_success:
            await response.aread()
            raise LoadError(f"status {response.status_code}: {response.text[:300]}")
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            now_s = time.perf_counter()
            chunk = json.loads(line[6:])
            if "error" in chunk:
                raise LoadError(f"error in the stream: {str(chunk['error'])[:300]}")
            usage = chunk.get("usage") or usage
            if chunk["choices"]:
                end_s = now_s
            if any(_carries_token(choice) for choice in chunk["choices"]):
                at_s.append(now_s)
    tokens = usage.get("completion_tokens")
    if tokens != load.output_tokens or not at_s:
        raise LoadError(f"{tokens} tokens in {len(at_s)} chunks instead of {load.output_tokens}")
    gaps_s = [after - before for before, after in itertools.pairwise(at_s)]
    return Stream(at_s[0] - begin_s, gaps_s, end_s - begin_s, usage.get("prompt_tokens", 0), tokens)


def _carries_token(choice: dict[str, Any]) -> bool:
    """Whether a chunk is one of a token: some servers end with one that holds a reason only."""
    return bool(choice.get("text") or choice.get("token_ids")) or not choice.get("finish_reason")
