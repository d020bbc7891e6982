"""The fields that chat, completions and gRPC share: how tokens are chosen and when an answer ends.

Types are strict (true is not 1, "10" is not 10, 1.5 is not an integer; NaN and Infinity are refused), unknown fields
are allowed, null means absent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from baton.errors import InvalidRequestError
from baton.router import limits
from baton.router.protocol.parse import shown

__all__ = ["SamplingFields", "SloFields", "StreamOptions", "TokenId", "require"]

_UNSUPPORTED = {
    "audio": "this server writes text only",
    "best_of": "only best_of equal to n is served",
    "chat_template": "templates come from the model only",
    "documents": "put documents into the messages",
    "functions": "function calling is not served",
    "guided_choice": "constrained output is not served",
    "guided_grammar": "constrained output is not served",
    "guided_json": "constrained output is not served",
    "guided_regex": "constrained output is not served",
    "kv_transfer_params": "the cluster moves KV pages by itself",
    "logits_processors": "code in requests is not served",
    "prompt_embeds": "send text or token ids",
    "response_format": 'only {"type": "text"} is served',
    "structured_outputs": "constrained output is not served",
    "suffix": "text insertion is not served",
    "tools": "tool calling is not served",
    "use_beam_search": "beam search is not served",
}


def require(condition: bool, param: str, limit: str, given: object) -> None:
    """Refuse the request unless `condition`: `param` must be `limit`, got `given`."""
    if not condition:
        raise InvalidRequestError(f"{param} must be {limit}, got {shown(given)}", param=param)


def _is_int(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _stop(value: Any) -> Any:
    if value is None:
        return None
    stops = [value] if isinstance(value, str) else value
    require(isinstance(stops, list), "stop", "a string or a list of strings", value)
    limit = f"at most {limits.MAX_STOP_STRINGS} strings"
    require(len(stops) <= limits.MAX_STOP_STRINGS, "stop", limit, stops)
    for index, text in enumerate(stops):
        limit = f"a string of 1 to {limits.MAX_STOP_CHARS} characters"
        require(isinstance(text, str) and 0 < len(text) <= limits.MAX_STOP_CHARS, f"stop[{index}]", limit, text)
    return stops


def _bad_words(value: Any) -> Any:
    if value is None:
        return None
    limit = f"a list of at most {limits.MAX_BAD_WORDS} strings"
    require(isinstance(value, list) and len(value) <= limits.MAX_BAD_WORDS, "bad_words", limit, value)
    for index, text in enumerate(value):
        limit = f"a string of 1 to {limits.MAX_BAD_WORD_CHARS} characters, not only spaces"
        is_word = isinstance(text, str) and bool(text.strip()) and len(text) <= limits.MAX_BAD_WORD_CHARS
        require(is_word, f"bad_words[{index}]", limit, text)
    return value


def _logit_bias(value: Any) -> Any:
    if value is None:
        return None
    limit = f"an object of at most {limits.MAX_LOGIT_BIAS} token ids"
    require(isinstance(value, dict) and len(value) <= limits.MAX_LOGIT_BIAS, "logit_bias", limit, value)
    parsed: dict[int, float] = {}
    for key, bias in value.items():
        is_id = _is_int(key) or (isinstance(key, str) and key.isascii() and key.isdecimal() and len(key) <= 10)
        require(is_id, "logit_bias", "keyed by token ids", key)
        is_bias = isinstance(bias, int | float) and not isinstance(bias, bool) and -100 <= bias <= 100
        require(is_bias, f"logit_bias.{key}", "a number of -100 to 100", bias)
        parsed[int(key)] = float(bias)
    return parsed


def _ids(param: str, at_most: int) -> Callable[[Any], Any]:
    def check(value: Any) -> Any:
        if value is not None:
            limit = f"a list of at most {at_most} token ids"
            require(isinstance(value, list) and len(value) <= at_most, param, limit, value)
        return value

    return check


def _temperature(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < limits.MIN_TEMPERATURE:
        require(False, "temperature", f"0 or {limits.MIN_TEMPERATURE} to {limits.MAX_TEMPERATURE:g}", value)
    return value


TokenId = Annotated[int, Field(ge=0, le=limits.MAX_TOKENS_PER_NUMBER)]
_Count = Annotated[int, Field(ge=1)]
_Number = Annotated[float, Field(allow_inf_nan=False)]


class StreamOptions(BaseModel):
    """What a stream carries besides text."""

    model_config = ConfigDict(extra="allow")

    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SloFields(BaseModel):
    """What a request asks to be held to, in milliseconds."""

    model_config = ConfigDict(extra="forbid")

    ttft_ms: Annotated[_Number, Field(gt=0, le=limits.MAX_SLO_MS)] | None = None
    tpot_ms: Annotated[_Number, Field(gt=0, le=limits.MAX_SLO_MS)] | None = None


class SamplingFields(BaseModel):
    """Fields of every generation request, named as OpenAI and vLLM name them."""

    model_config = ConfigDict(extra="allow", protected_namespaces=())

    model: Annotated[str, Field(max_length=limits.MAX_MODEL_NAME_CHARS)] | None = None
    max_tokens: _Count | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[_Number, Field(ge=0, le=limits.MAX_TEMPERATURE), BeforeValidator(_temperature)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=limits.MAX_TOP_K)] | None = None
    top_p: Annotated[_Number, Field(gt=0, le=1)] | None = None
    min_p: Annotated[_Number, Field(ge=0, le=1)] | None = None
    seed: Annotated[int, Field(ge=0, lt=1 << 64)] | None = None
    repetition_penalty: (
        Annotated[_Number, Field(ge=limits.MIN_REPETITION_PENALTY, le=limits.MAX_REPETITION_PENALTY)] | None
    ) = None
    presence_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[_Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[int, float] | None, BeforeValidator(_logit_bias)] = None
    allowed_token_ids: Annotated[
        list[TokenId] | None, BeforeValidator(_ids("allowed_token_ids", limits.MAX_ALLOWED_TOKEN_IDS))
    ] = None
    bad_words: Annotated[list[str] | None, BeforeValidator(_bad_words)] = None
    stop: Annotated[list[str] | None, BeforeValidator(_stop)] = None
    stop_token_ids: Annotated[
        list[TokenId] | None, BeforeValidator(_ids("stop_token_ids", limits.MAX_STOP_TOKEN_IDS))
    ] = None
    include_stop_str_in_output: bool | None = None
    ignore_eos: bool | None = None
    skip_special_tokens: bool | None = None
    prompt_logprobs: Annotated[int, Field(ge=0, le=limits.MAX_LOGPROBS)] | None = None
    n: Annotated[int, Field(ge=1, le=limits.MAX_N)] | None = None
    best_of: int | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: Annotated[int, Field(ge=limits.PRIORITY_RANGE[0], le=limits.PRIORITY_RANGE[1])] | None = None
    priority_class: Annotated[str, Field(max_length=limits.MAX_CLASS_CHARS)] | None = None
    slo: SloFields | None = None
    cache_salt: Annotated[str, Field(max_length=limits.MAX_CACHE_SALT_CHARS)] | None = None
    session_id: Annotated[str, Field(max_length=limits.MAX_SESSION_ID_CHARS)] | None = None
    request_id: Annotated[str, Field(max_length=limits.MAX_REQUEST_ID_CHARS)] | None = None
    return_token_ids: bool | None = None
    add_special_tokens: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.stream_options is not None and not self.stream:
            require(False, "stream_options", "absent unless stream is true", self.stream_options.model_dump())
        if self.best_of is not None:
            require(self.best_of == (self.n or 1), "best_of", f"equal to n={self.n or 1}", self.best_of)
        self._refuse_unsupported()
        return self

    def _refuse_unsupported(self) -> None:
        extra = self.model_extra or {}
        for name, reason in _UNSUPPORTED.items():
            given = extra.get(name)
            if given in (None, False, [], "") or (name == "response_format" and given == {"type": "text"}):
                continue
            if name == "tools" and extra.get("tool_choice") == "none":
                continue
            raise InvalidRequestError(f"{name} is not supported: {reason}", param=name, code="unsupported_parameter")
