"""`/v1/chat/completions`: messages, checked and reduced to what a template may see."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BeforeValidator, Field, model_validator

from baton.errors import InvalidRequestError
from baton.router import limits
from baton.router.protocol.fields import SamplingFields, require
from baton.router.protocol.parse import shown
from baton.router.token_bounds import TokenBounds

__all__ = ["ChatRequest", "Messages", "check_messages"]

ROLES = ("system", "developer", "user", "assistant", "tool")
_TEXT_KEYS = ("name", "tool_call_id", "reasoning_content")


def check_messages(value: Any) -> list[dict[str, Any]]:
    """`messages` with plain text as content and only the keys that templates read.

    Raises:
        InvalidRequestError: too many, none, an unknown role, or content that is not text.
    """
    limit = f"a list of 1 to {limits.MAX_MESSAGES} messages"
    require(isinstance(value, list) and 0 < len(value) <= limits.MAX_MESSAGES, "messages", limit, value)
    return [_message(item, f"messages[{index}]") for index, item in enumerate(value)]


def _message(item: Any, path: str) -> dict[str, Any]:
    require(isinstance(item, dict), path, "an object with role and content", item)
    role = item.get("role")
    require(isinstance(role, str) and role in ROLES, f"{path}.role", f"one of {', '.join(ROLES)}", role)
    message: dict[str, Any] = {"role": role}
    tool_calls = item.get("tool_calls")
    if tool_calls:
        require(role == "assistant" and isinstance(tool_calls, list), f"{path}.tool_calls", "a list", tool_calls)
        message["tool_calls"] = tool_calls
    if item.get("content") is not None or not tool_calls:
        message["content"] = _content(item.get("content"), f"{path}.content")
    for key in _TEXT_KEYS:
        text = item.get(key)
        if text is not None:
            require(isinstance(text, str), f"{path}.{key}", "a string", text)
            message[key] = text
    return message


def _content(content: Any, path: str) -> str:
    if isinstance(content, str):
        return content
    require(isinstance(content, list) and bool(content), path, "a string or a list of text parts", content)
    require(len(content) <= limits.MAX_CONTENT_PARTS, path, f"at most {limits.MAX_CONTENT_PARTS} parts", content)
    texts = []
    for index, part in enumerate(content):
        here = f"{path}[{index}]"
        require(isinstance(part, dict), here, 'an object like {"type": "text", "text": ...}', part)
        if part.get("type") != "text":
            raise InvalidRequestError(
                f"{here}.type {shown(part.get('type'))} is not served: this model reads text only",
                param=f"{here}.type",
                code="unsupported_content",
            )
        require(isinstance(part.get("text"), str), f"{here}.text", "a string", part.get("text"))
        texts.append(part["text"])
    return "\n".join(texts)


Messages = Annotated[list[dict[str, Any]], BeforeValidator(check_messages)]


class ChatRequest(SamplingFields):
    """Body of `/v1/chat/completions`."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _check_logprobs(self) -> Self:
        if self.top_logprobs and not self.logprobs:
            require(False, "top_logprobs", "absent unless logprobs is true", self.top_logprobs)
        return self

    def token_bounds(self) -> TokenBounds:
        """What it may take of a tenant's rate; the template's own tokens are not counted."""
        text = "".join(message.get("content") or "" for message in self.messages)
        return TokenBounds.of([text], answers=self.n or 1, max_tokens=self.max_completion_tokens or self.max_tokens)

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives per token, None when not asked for."""
        return (self.top_logprobs or 0) if self.logprobs else None
