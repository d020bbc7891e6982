"""Conversations with a server over its OpenAI API: text streams to standard output, figures go to standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Self

import httpx

from baton.cluster.run_state import read_run_state
from baton.cluster.summary import base_url
from baton.errors import BatonError, DeadlineError, UnavailableError

__all__ = ["Answer", "ChatSession", "Server", "complete_text"]

_TIMEOUT = httpx.Timeout(connect=5.0, read=600.0, write=30.0, pool=5.0)


@dataclass(slots=True)
class Answer:
    """One streamed answer and what it took.

    Attributes:
        first_token_s, duration_s: from sending the request to the first text and to the end; first_token_s is None
            when no text came.
        usage: the API's `usage` object; empty when the answer was stopped before its end.
        extension: Baton's own figures from the same message.
        request_id: what `baton trace` and `baton explain` find the request by.
    """

    text: str = ""
    first_token_s: float | None = None
    duration_s: float = 0.0
    usage: dict[str, Any] = field(default_factory=dict)
    extension: dict[str, Any] = field(default_factory=dict)
    request_id: str = ""

    def figures(self) -> str:
        """TTFT, speed, tokens, cached tokens, and which pair of workers served."""
        parts = []
        if self.first_token_s is not None:
            parts.append(f"first token {self.first_token_s * 1000:.0f} ms")
        num_tokens = self.usage.get("completion_tokens", 0)
        decode_s = self.duration_s - (self.first_token_s or 0.0)
        if num_tokens > 1 and decode_s > 0:
            parts.append(f"{(num_tokens - 1) / decode_s:.0f} tokens/s")
        if self.usage:
            cached = (self.usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
            parts.append(f"{self.usage.get('prompt_tokens', 0)} prompt tokens ({cached} cached)")
            parts.append(f"{num_tokens} written")
        pair = [self.extension.get("prefill_instance"), self.extension.get("decode_instance")]
        if pair[1]:
            parts.append(f"{pair[0]} → {pair[1]}" if pair[0] and pair[0] != pair[1] else f"{pair[1]} alone")
        return " · ".join(parts) or "stopped"


@dataclass(frozen=True, slots=True)
class Server:
    """Where requests go: `url` has no trailing /v1."""

    url: str
    model: str
    api_key: str | None = field(default=None, repr=False)

    @classmethod
    def find(cls, name: str, url: str | None, api_key: str | None, model: str | None) -> Self:
        """The server at `url`, or the cluster `name` that runs here.

        Raises:
            UnavailableError: no such cluster, or it is not ready, or the URL does not answer.
        """
        if url is not None:
            server = cls(base_url(url), model or "", api_key)
            return server if model else cls(server.url, server.first_model(), api_key)
        state = read_run_state(name)
        if not state.ready:
            raise UnavailableError(f"{name} is still starting; `baton status --name {name}` shows how far it is")
        return cls(base_url(state.http_url), model or state.model, api_key or state.api_key)

    def first_model(self) -> str:
        """The name of the first model that the server lists."""
        with _errors(self.url):
            response = httpx.get(f"{self.url}/v1/models", headers=self._headers(), timeout=_TIMEOUT)
            _raise_for_status(response)
            return str(response.json()["data"][0]["id"])

    def stream(self, path: str, body: dict[str, Any], on_text: Callable[[str], None]) -> Answer:
        """Send `body` with streaming and usage on, pass each piece of text to `on_text`; Ctrl-C ends the answer early.

        Raises:
            BatonError: what the server answered.
        """
        answer = Answer()
        body = {**body, "model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        started_s = time.monotonic()
        try:
            for chunk in self._chunks(path, body, answer):
                text = "".join(_text(choice) for choice in chunk.get("choices") or [])
                if text:
                    if answer.first_token_s is None:
                        answer.first_token_s = time.monotonic() - started_s
                    answer.text += text
                    on_text(text)
                usage = chunk.get("usage")
                if usage:
                    answer.usage = usage
                    answer.extension = chunk.get("baton") or usage.get("baton") or {}
        except KeyboardInterrupt:
            answer.usage = {}
        answer.duration_s = time.monotonic() - started_s
        return answer

    def _chunks(self, path: str, body: dict[str, Any], answer: Answer) -> Iterator[dict[str, Any]]:
        with (
            _errors(self.url),
            httpx.stream("POST", self.url + path, json=body, headers=self._headers(), timeout=_TIMEOUT) as response,
        ):
            if response.is_error:
                response.read()
            _raise_for_status(response)
            answer.request_id = response.headers.get("x-request-id", "")
            for line in response.iter_lines():
                data = line.removeprefix("data:").strip()
                if not line.startswith("data:") or data == "[DONE]":
                    continue
                chunk = json.loads(data)
                if "error" in chunk:
                    raise BatonError(f"the server broke off: {chunk['error'].get('message', chunk['error'])}")
                yield chunk

    def _headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.api_key}"} if self.api_key else {}


class ChatSession:
    """A conversation; each turn sends the whole of it.

    Args:
        verbose: tell the request id of each answer.
    """

    def __init__(
        self,
        server: Server,
        *,
        system: str | None,
        max_tokens: int,
        temperature: float,
        seed: int | None,
        verbose: bool = False,
    ) -> None:
        self._server = server
        self._verbose = verbose
        self._start = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._start)
        self._options = _options(max_tokens, temperature, seed)

    def reset(self) -> None:
        """Forget everything said."""
        self._messages = list(self._start)

    def say(self, text: str) -> Answer:
        """Print the answer to `text` as it comes. An answer that was broken off is not remembered."""
        messages = [*self._messages, {"role": "user", "content": text}]
        answer = self._server.stream("/v1/chat/completions", {"messages": messages, **self._options}, _write)
        _finish(answer, self._verbose)
        if answer.usage:
            self._messages = [*messages, {"role": "assistant", "content": answer.text}]
        return answer


def complete_text(
    server: Server, prompt: str, *, max_tokens: int, temperature: float, seed: int | None, verbose: bool = False
) -> Answer:
    """Print the continuation of `prompt` as it comes."""
    body = {"prompt": prompt, **_options(max_tokens, temperature, seed)}
    answer = server.stream("/v1/completions", body, _write)
    _finish(answer, verbose)
    return answer


def _options(max_tokens: int, temperature: float, seed: int | None) -> dict[str, Any]:
    options: dict[str, Any] = {"max_tokens": max_tokens, "temperature": temperature}
    return options if seed is None else {**options, "seed": seed}


def _text(choice: dict[str, Any]) -> str:
    return str(choice.get("text") or (choice.get("delta") or {}).get("content") or "")


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _finish(answer: Answer, verbose: bool) -> None:
    if not answer.text.endswith("\n"):
        _write("\n")
    request = f" · request {answer.request_id}" if verbose and answer.request_id else ""
    print(f"[{answer.figures()}{request}]", file=sys.stderr)


@contextmanager
def _errors(url: str) -> Iterator[None]:
    """Turns httpx's errors into ours, naming the server."""
    try:
        yield
    except httpx.TimeoutException as error:
        raise DeadlineError(f"{url} did not answer in time ({type(error).__name__})") from error
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url} cannot be reached: {error}") from error


def _raise_for_status(response: httpx.Response) -> None:
    if not response.is_error:
        return
    try:
        message = response.json()["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = response.text[:500]
    raise BatonError(f"{response.request.url} answered {response.status_code}: {message}")
