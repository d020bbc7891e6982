"""Deltas to OpenAI's JSON: stream chunks and whole responses, for chat and for completions.

One `Answer` object lives as long as one HTTP request. `chunks` turns a delta into stream objects (none while text is
held back); `add` collects for `response`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import orjson

from baton.engine.tokenizer import Tokenizer
from baton.router.client import ChoiceDelta
from baton.router.protocol.fields import SamplingFields
from baton.router.protocol.logprobs import chat_logprobs, completion_logprobs, prompt_logprobs
from baton.router.protocol.usage import UsageMeter
from baton.router.validation import GenerationSpec

__all__ = ["Answer", "ChatAnswer", "CompletionAnswer"]


class Answer(ABC):
    """What both APIs share.

    Args:
        created_s: seconds since the epoch.

    Attributes:
        spec: what is answered.
        is_streamed: whether the client wants the answer as it comes.
        usage: so far.
    """

    _id_prefix: str
    _object: str
    _chunk_object: str

    def __init__(
        self, fields: SamplingFields, spec: GenerationSpec, tokenizer: Tokenizer, *, model: str, created_s: int
    ) -> None:
        options = fields.stream_options
        self._include_usage = bool(options and options.include_usage)
        self._continuous_usage = bool(options and options.continuous_usage_stats) and self._include_usage
        asks_timing = bool(fields.include_timing or (options and options.include_timing))
        # Timing has no place of its own.
        self._include_usage = self._include_usage or asks_timing
        self.is_streamed = bool(fields.stream)
        self._return_token_ids = bool(fields.return_token_ids)
        self._wants_prompt_logprobs = fields.prompt_logprobs is not None
        self.spec = spec
        self._tokenizer = tokenizer
        self._head = {"id": f"{self._id_prefix}-{spec.request_id}", "created": created_s, "model": model}
        self._whole = [ChoiceDelta(index=choice.index) for choice in spec.choices]
        self._matched: dict[int, str | None] = {}
        self.usage = UsageMeter(spec.n, with_timing=asks_timing)

    def add(self, delta: ChoiceDelta) -> None:
        """Collect one delta."""
        self.usage.add(delta)
        whole = self._whole[delta.index]
        whole.text += delta.text
        whole.token_ids += delta.token_ids
        whole.logprobs += delta.logprobs
        whole.text_offsets += delta.text_offsets
        whole.prompt_logprobs = whole.prompt_logprobs or delta.prompt_logprobs
        whole.finish_reason = delta.finish_reason
        whole.matched_stop = delta.matched_stop

    def response(self) -> dict[str, Any]:
        """The whole answer, once every choice has ended."""
        choices = [{**self._choice(whole), **self._extras(whole)} for whole in self._whole]
        return {**self._head, "object": self._object, "choices": choices, "usage": self.usage.as_dict()}

    def opening(self) -> Iterator[dict[str, Any]]:
        """Chunks that come before any text."""
        return iter(())

    def chunks(self, delta: ChoiceDelta) -> Iterator[dict[str, Any]]:
        """Chunks for one delta."""
        self.usage.add(delta)
        has_news = delta.text or delta.logprobs or delta.finish_reason or delta.prompt_logprobs
        if has_news or (self._return_token_ids and delta.token_ids):
            yield self._chunk([{**self._chunk_choice(delta), **self._extras(delta)}])

    @property
    def returns_token_ids(self) -> bool:
        """Whether chunks tell the ids of their tokens."""
        return self._return_token_ids

    @property
    def has_plain_chunks(self) -> bool:
        """Whether chunks of plain tokens differ in text and token id only, so that `plain_chunk` can be used."""
        return (
            len(self.spec.choices) == 1
            and not self.spec.stop
            and self.spec.choices[0].sampling.logprobs is None
            and not self._continuous_usage
        )

    def plain_chunk(self, *, has_text: bool) -> tuple[bytes, bytes, bytes]:
        """The event of a plain token in three parts: before its text in JSON, before its id, and behind that.

        Without text, or where ids are not returned, the second or the third part begins where the one before ends.
        """
        text, token_id = "\ue000plain\ue001", 9_007_199_254_740_991
        delta = ChoiceDelta(index=0, text=text if has_text else "", token_ids=[token_id])
        event = b"data: " + orjson.dumps(self._chunk([{**self._chunk_choice(delta), **self._extras(delta)}])) + b"\n\n"
        head, _, rest = event.partition(orjson.dumps(text)) if has_text else (b"", b"", event)
        middle, _, tail = rest.partition(b"%d" % token_id) if self._return_token_ids else (rest, b"", b"")
        return head, middle, tail

    def closing(self) -> Iterator[dict[str, Any]]:
        """Chunks after the last text."""
        if self._include_usage:
            yield {**self._chunk([]), "usage": self.usage.as_dict()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        chunk = {**self._head, "object": self._chunk_object, "choices": choices}
        if self._include_usage:
            chunk["usage"] = self.usage.as_dict() if self._continuous_usage else None
        return chunk

    def _extras(self, delta: ChoiceDelta) -> dict[str, Any]:
        extras: dict[str, Any] = {"finish_reason": delta.finish_reason}
        if delta.finish_reason:
            extras["stop_reason"] = delta.matched_stop
        if self._wants_prompt_logprobs and delta.prompt_logprobs is not None:
            extras["prompt_logprobs"] = prompt_logprobs(delta.prompt_logprobs, self._tokenizer)
        if self._return_token_ids:
            extras["token_ids"] = delta.token_ids
        return extras

    @abstractmethod
    def _choice(self, whole: ChoiceDelta) -> dict[str, Any]: ...

    @abstractmethod
    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]: ...


class ChatAnswer(Answer):
    """Chat completions."""

    _id_prefix = "chatcmpl"
    _object = "chat.completion"
    _chunk_object = "chat.completion.chunk"

    def opening(self) -> Iterator[dict[str, Any]]:
        """The role, once per choice."""
        for choice in self.spec.choices:
            delta = {"role": "assistant", "content": ""}
            yield self._chunk([{"index": choice.index, "delta": delta, "logprobs": None, "finish_reason": None}])

    def _choice(self, whole: ChoiceDelta) -> dict[str, Any]:
        message = {"role": "assistant", "content": whole.text, "refusal": None}
        return {"index": whole.index, "message": message, "logprobs": self._logprobs(whole)}

    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        content = {"content": delta.text} if delta.text else {}
        return {"index": delta.index, "delta": content, "logprobs": self._logprobs(delta)}

    def _logprobs(self, delta: ChoiceDelta) -> dict[str, Any] | None:
        return chat_logprobs(delta.logprobs, self._tokenizer) if delta.logprobs else None


class CompletionAnswer(Answer):
    """Completions."""

    _id_prefix = "cmpl"
    _object = "text_completion"
    _chunk_object = "text_completion"

    def _choice(self, whole: ChoiceDelta) -> dict[str, Any]:
        return {"index": whole.index, "text": whole.text, "logprobs": self._logprobs(whole, first=True)}

    def _chunk_choice(self, delta: ChoiceDelta) -> dict[str, Any]:
        first = delta.prompt_logprobs is not None
        return {"index": delta.index, "text": delta.text, "logprobs": self._logprobs(delta, first=first)}

    def _logprobs(self, delta: ChoiceDelta, *, first: bool) -> dict[str, Any] | None:
        choice = self.spec.choices[delta.index]
        if choice.sampling.logprobs is None:
            return None
        echoed = choice.prompt_token_ids if self.spec.echo and first else ()
        if not echoed and not delta.logprobs:
            return None
        return completion_logprobs(delta, self._tokenizer, echoed)
