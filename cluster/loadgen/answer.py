"""One answer while it comes: when each chunk was there, and what the server says of it. Pure; time is an argument.

EventLines   bytes of a text/event-stream -> the data of each event
Answer       the events of one answer, or the messages of a gRPC stream
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import orjson

__all__ = ["Answer", "EventLines", "MalformedAnswerError"]

_MAX_LINE_BYTES = 64 << 20


class MalformedAnswerError(Exception):
    """What came is no answer of this API."""


class EventLines:
    """Cuts a stream of server-sent events into the data of its events; these APIs put each on one line."""

    __slots__ = ("_rest",)

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> list[bytes]:
        """Data of the events whose line is complete; [DONE] is left out.

        Raises:
            MalformedAnswerError: a line without an end.
        """
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > _MAX_LINE_BYTES:
            raise MalformedAnswerError(f"an event of more than {_MAX_LINE_BYTES} bytes")
        events = [line[5:].strip() for line in lines if line.startswith(b"data:")]
        return [event for event in events if event != b"[DONE]"]


@dataclass(slots=True)
class Answer:
    """What came so far; the clock is the caller's.

    Attributes:
        chunk_at_s: of every chunk that carries tokens.
        prompt_tokens, cached_tokens, completion_tokens: as the server counts; None where it does not tell.
        seen_tokens: token ids that were sent, else chunks.
        token_ids: empty where the server does not return them.
        http_status: of the response, 0 before it; gRPC's codes are given as their HTTP counterparts.
    """

    chunk_at_s: list[float] = field(default_factory=list)
    end_s: float = 0.0
    seen_tokens: int = 0
    text: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str = ""
    prompt_tokens: int | None = None
    cached_tokens: int | None = None
    completion_tokens: int | None = None
    http_status: int = 0
    retry_after_s: float | None = None
    error: str = ""

    def take_event(self, event: bytes, now_s: float) -> None:
        """One event of an OpenAI-compatible stream, of completions or of chat.

        Raises:
            MalformedAnswerError: it is no JSON object of that API.
        """
        try:
            chunk = orjson.loads(event)
            if "error" in chunk:
                self.error = _error_text(chunk)
                return
            for choice in chunk.get("choices") or ():
                self._take_choice(choice, now_s)
            if usage := chunk.get("usage"):
                self._take_usage(usage)
        except (ValueError, TypeError, AttributeError, KeyError) as error:
            raise MalformedAnswerError(f"an event that is no chunk of an answer: {event[:200]!r}") from error

    def take_tokens(self, token_ids: list[int], text: str, now_s: float) -> None:
        """One chunk that carries tokens."""
        self.chunk_at_s.append(now_s)
        self.end_s = now_s
        self.seen_tokens += max(1, len(token_ids))
        self.token_ids += token_ids
        if text:
            self.text.append(text)

    @property
    def output_tokens(self) -> int:
        """As the server counts, else as seen."""
        return self.seen_tokens if self.completion_tokens is None else self.completion_tokens

    def _take_choice(self, choice: dict[str, Any], now_s: float) -> None:
        delta = choice.get("delta")
        text = choice.get("text") if delta is None else delta.get("content") or delta.get("reasoning_content")
        token_ids = choice.get("token_ids") or []
        reason = choice.get("finish_reason")
        # A token may have no text yet, where its bytes are part of a character; a chat's first chunk is its role alone.
        if text or token_ids or (delta is None and not reason):
            self.take_tokens(token_ids, text or "", now_s)
        if reason:
            self.finish_reason = reason
            self.end_s = now_s

    def _take_usage(self, usage: dict[str, Any]) -> None:
        self.prompt_tokens = usage.get("prompt_tokens")
        self.completion_tokens = usage.get("completion_tokens")
        self.cached_tokens = (usage.get("prompt_tokens_details") or {}).get("cached_tokens")

    def take_refusal(self, body: bytes) -> None:
        """The body of a response that is an error."""
        try:
            self.error = _error_text(orjson.loads(body))
        except (ValueError, TypeError, AttributeError):
            self.error = body[:300].decode(errors="replace").strip()
        self.error = self.error or f"status {self.http_status}"


def _error_text(body: dict[str, Any]) -> str:
    error = body.get("error", body)
    text = error.get("message") if isinstance(error, dict) else error
    return str(text or error)[:300]
