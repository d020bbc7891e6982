"""`/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from baton.router import limits
from baton.router.protocol.chat import Messages
from baton.router.protocol.fields import TokenId, require

__all__ = ["DetokenizeRequest", "TokenizeRequest"]


class TokenizeRequest(BaseModel):
    """Text or messages to token ids."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME_CHARS)] | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        both = self.prompt is not None and self.messages is not None
        require(not both and not (self.prompt is None and self.messages is None), "prompt", "given, or messages", None)
        return self


def _tokens(value: Any) -> Any:
    limit = f"a list of at most {limits.MAX_DETOKENIZE_TOKENS} token ids"
    require(isinstance(value, list) and len(value) <= limits.MAX_DETOKENIZE_TOKENS, "tokens", limit, value)
    return value


class DetokenizeRequest(BaseModel):
    """Token ids to text."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME_CHARS)] | None = None
    tokens: Annotated[list[TokenId], BeforeValidator(_tokens)]
