"""`/v1/completions`: one or many prompts, as text or as token ids."""

from __future__ import annotations

import operator
from typing import Annotated, Any

from pydantic import Field, PlainValidator

from baton.router import limits
from baton.router.protocol.fields import SamplingFields, require
from baton.router.token_bounds import TokenBounds

__all__ = ["CompletionRequest", "Prompt"]

Prompt = str | list[int]


def _prompts(value: Any) -> list[Prompt]:
    if isinstance(value, str):
        return [value]
    require(isinstance(value, list) and bool(value), "prompt", "a string, token ids, or a list of these", value)
    if _are_ids(value):
        return [value]
    limit = f"at most {limits.MAX_PROMPTS} prompts"
    require(len(value) <= limits.MAX_PROMPTS, "prompt", limit, value)
    for index, prompt in enumerate(value):
        is_prompt = isinstance(prompt, str) or (isinstance(prompt, list) and bool(prompt) and _are_ids(prompt))
        require(is_prompt, f"prompt[{index}]", "a string or a list of token ids", prompt)
    return list(value)


def _are_ids(value: list[Any]) -> bool:
    # Judged by type only: a float, a boolean or a string is no id; the range is checked against the vocabulary later.
    return operator.countOf(map(type, value), int) == len(value)


class CompletionRequest(SamplingFields):
    """Body of `/v1/completions`."""

    prompt: Annotated[list[Any], PlainValidator(_prompts)]
    logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS)] | None = None
    echo: bool | None = None

    def token_bounds(self) -> TokenBounds:
        """What it may take of a tenant's rate."""
        return TokenBounds.of(self.prompt, answers=self.n or 1, max_tokens=self.max_tokens)
