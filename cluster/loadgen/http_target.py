"""An OpenAI-compatible server as the target of a load: /v1/completions, or /v1/chat/completions."""

from __future__ import annotations

import contextlib
from typing import Any

import httpx
import numpy as np
import orjson

from baton.cluster.loadgen.answer import Answer, EventLines
from baton.cluster.loadgen.http_connections import Exchange, HttpConnections
from baton.cluster.loadgen.load_class import LoadClass
from baton.cluster.loadgen.target import Prompt, Sampling, ServerInfo
from baton.errors import BatonError, UnavailableError

__all__ = ["HttpTarget", "find_server"]

_FIND_TIMEOUT_S = 10.0


def find_server(url: str, *, api_key: str | None, model: str | None) -> ServerInfo:
    """Ask what a server calls its model, and how long its window is.

    Raises:
        UnavailableError: it does not answer.
        BatonError: it answers, but lists no such model.
    """
    headers = _headers(api_key)
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=_FIND_TIMEOUT_S, trust_env=False) as client:
            response = client.get("/v1/models").raise_for_status()
            models = {str(each["id"]): each for each in response.json()["data"]}
    except httpx.HTTPError as error:
        raise UnavailableError(f"{url}/v1/models does not answer: {error or type(error).__name__}") from error
    except (ValueError, KeyError, TypeError) as error:
        raise BatonError(f"{url}/v1/models is no list of models of an OpenAI-compatible server") from error
    if not models or (model is not None and model not in models):
        raise BatonError(f"{url} serves {', '.join(models) or 'no model'}, not {model}")
    name = model or next(iter(models))
    longest = models[name].get("max_model_len")
    return ServerInfo(
        kind="http",
        url=url,
        model=name,
        max_model_len=longest if isinstance(longest, int) else None,
        version=response.headers.get("server", ""),
    )


def _headers(api_key: str | None) -> dict[str, str]:
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


class HttpTarget:
    """See `Target`.

    Args:
        is_chat: send messages instead of a prompt; needs prompts of text.
        wants_ids: have the ids of answers sent too, for conversations of token ids.
    """

    def __init__(
        self, info: ServerInfo, sampling: Sampling, *, api_key: str | None, is_chat: bool, wants_ids: bool
    ) -> None:
        self.info = info
        self._path = "/v1/chat/completions" if is_chat else "/v1/completions"
        self._is_chat = is_chat
        self._connections = HttpConnections(info.url, {**_headers(api_key), "Accept": "text/event-stream"})
        self._sampling = sampling
        self._base: dict[str, Any] = {
            "model": info.model,
            "temperature": sampling.temperature,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        if sampling.ignore_eos:
            self._base["ignore_eos"] = True
        if wants_ids:
            self._base["return_token_ids"] = True

    def prepare(self, prompt: Prompt, output_tokens: int, load_class: LoadClass) -> bytes:
        """The request's bytes."""
        body = {**self._base, "max_tokens": output_tokens}
        if self._is_chat:
            roles = ("user", "assistant")
            body["messages"] = [
                {"role": roles[number % 2], "content": text} for number, text in enumerate(prompt.texts)
            ]
        elif prompt.as_text:
            body["prompt"] = " ".join(prompt.texts)
        else:
            body["prompt"] = prompt.ids[0] if len(prompt.ids) == 1 else np.concatenate(prompt.ids)
        body |= _class_fields(load_class)
        if self._sampling.send_slo and load_class.slo:
            bounds = {"ttft_ms": load_class.slo.ttft_ms, "tpot_ms": load_class.slo.tpot_ms}
            body["slo"] = {key: value for key, value in bounds.items() if value is not None}
        head = b"X-Baton-Tenant: %b\r\n" % load_class.tenant.encode() if load_class.tenant else b""
        return self._connections.message(self._path, orjson.dumps(body, option=orjson.OPT_SERIALIZE_NUMPY), head)

    async def send(self, prepared: bytes, answer: Answer) -> None:
        """See `Target`."""
        events = EventLines()
        refusal = bytearray()

        def on_body(exchange: Exchange, body: bytes, now_s: float) -> None:
            if exchange.status != 200:
                refusal.extend(body)
                return
            for event in events.feed(body):
                answer.take_event(event, now_s)

        exchange = await self._connections.request(prepared, on_body)
        answer.http_status = exchange.status
        if exchange.status != 200:
            with contextlib.suppress(ValueError):
                answer.retry_after_s = float(exchange.headers.get(b"retry-after", b""))
            answer.take_refusal(bytes(refusal))

    async def close(self) -> None:
        """See `Target`."""
        await self._connections.close()


def _class_fields(load_class: LoadClass) -> dict[str, Any]:
    fields = {
        "priority": load_class.priority,
        "priority_class": load_class.priority_class,
        "user": load_class.tenant,
        "cache_salt": load_class.cache_salt,
    }
    return {name: value for name, value in fields.items() if value is not None}
