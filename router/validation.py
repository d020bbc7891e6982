"""From a checked request to what the engines get: pure, given a tokenizer and, where no seed was sent, a drawn one.

    ChatRequest | CompletionRequest | gRPC  ->  GenerationSpec  (one ChoiceSpec per answer)

All defaults are resolved here, so that a choice can be run again elsewhere and give the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from baton.engine.request import SamplingParams
from baton.engine.tokenizer import Tokenizer
from baton.errors import ContextLengthError, InvalidRequestError, NotFoundError
from baton.router import limits
from baton.router.model_card import ModelCard
from baton.router.protocol.chat import ChatRequest
from baton.router.protocol.completions import CompletionRequest, Prompt
from baton.router.protocol.fields import SamplingFields, SloFields, require
from baton.router.protocol.parse import shown

__all__ = [
    "ChoiceSpec",
    "GenerationSpec",
    "Slo",
    "build_chat",
    "build_completion",
    "build_spec",
    "check_ids",
    "check_model",
    "derived_seed",
    "encode_chat",
    "encode_prompt",
]

_MASK64 = (1 << 64) - 1
_DEFAULT_COMPLETION_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class ChoiceSpec:
    """One answer to one prompt.

    Attributes:
        index: position among the choices: prompt number times n, plus which of its n.
        prompt_token_ids: at least one id.
        sampling: complete, with this choice's own seed.
    """

    index: int
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Slo:
    """What a request asks to be held to; None: whatever it takes."""

    ttft_s: float | None = None
    tpot_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationSpec:
    """A whole client request.

    Attributes:
        request_id: the public one.
        choices: all answers, by index.
        n: answers per prompt.
        stop: strings that end an answer.
        echo: begin each answer with its prompt.
        priority: lower is served first, among its tenant's requests of its class.
        session_id: whose earlier requests' workers are preferred; "" where it belongs to no session.
        tenant: whose share this is, and whose cached blocks it may find; "" where tenants are not told apart.
        priority_class: of the configuration; "": the default one.
        slo: what is not said here, its class says.
    """

    request_id: str
    choices: tuple[ChoiceSpec, ...]
    n: int
    stop: tuple[str, ...] = ()
    include_stop: bool = False
    skip_special_tokens: bool = True
    echo: bool = False
    priority: int = 0
    cache_salt: str = ""
    session_id: str = ""
    tenant: str = ""
    priority_class: str = ""
    slo: Slo | None = None

    @property
    def num_tokens(self) -> int:
        """Prompt plus maximal output tokens of all choices."""
        return sum(len(choice.prompt_token_ids) + choice.sampling.max_tokens for choice in self.choices)


def derived_seed(seed: int, index: int) -> int:
    """Seed of choice `index` of n: the given one for the first, a mixed one (splitmix64) for the others."""
    if index == 0:
        return seed
    mixed = (seed + index * 0x9E3779B97F4A7C15) & _MASK64
    mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK64
    mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK64
    return mixed ^ (mixed >> 31)


def check_model(name: str | None, card: ModelCard) -> None:
    """Raises `NotFoundError` unless `name` is empty, absent or the served model."""
    if name and name != card.model_id:
        raise NotFoundError(f"the model {shown(name)} does not exist here; this server serves {card.model_id!r}")


def check_ids(ids: Sequence[int], card: ModelCard, param: str) -> None:
    """Raises `InvalidRequestError` unless every id is in the vocabulary."""
    if ids and (min(ids) < 0 or max(ids) >= card.vocab_size):
        wrong = next(token_id for token_id in ids if not 0 <= token_id < card.vocab_size)
        raise InvalidRequestError(
            f"{param} must hold token ids of 0 to {card.vocab_size - 1}, got {wrong}", param=param
        )


def encode_prompt(
    prompt: Prompt, tokenizer: Tokenizer, card: ModelCard, *, param: str, add_special_tokens: bool = True
) -> tuple[int, ...]:
    """Token ids of one prompt.

    Raises:
        InvalidRequestError: no tokens, ids outside the vocabulary, or (`ContextLengthError`) text that cannot fit.
    """
    if isinstance(prompt, str):
        _check_fits_at_all(prompt, tokenizer, card, param)
        ids = tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
    else:
        ids = prompt
    require(len(ids) > 0, param, "at least one token long", prompt)
    check_ids(ids, card, param)
    return tuple(ids)


def encode_chat(
    messages: Sequence[Mapping[str, Any]],
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    add_generation_prompt: bool = True,
    continue_final_message: bool = False,
    kwargs: Mapping[str, Any] | None = None,
) -> tuple[int, ...]:
    """Token ids of a conversation.

    Raises:
        InvalidRequestError: the template refuses it, or (`ContextLengthError`) it cannot fit.
    """
    for message in messages:
        _check_fits_at_all(message.get("content", ""), tokenizer, card, "messages")
    ids = tokenizer.apply_chat_template(
        messages,
        add_generation_prompt=add_generation_prompt,
        continue_final_message=continue_final_message,
        kwargs=kwargs,
    )
    require(len(ids) > 0, "messages", "at least one token long", messages)
    check_ids(ids, card, "messages")
    return tuple(ids)


def build_completion(
    request: CompletionRequest, tokenizer: Tokenizer, card: ModelCard, *, request_id: str, drawn_seed: int
) -> GenerationSpec:
    """The spec of a `/v1/completions` body.

    Raises:
        InvalidRequestError, NotFoundError: names the field and the limit.
    """
    check_model(request.model, card)
    _check_choices(len(request.prompt), request.n or 1)
    prompts = [
        encode_prompt(
            prompt, tokenizer, card, param="prompt", add_special_tokens=request.add_special_tokens is not False
        )
        for prompt in request.prompt
    ]
    return build_spec(
        request,
        prompts,
        tokenizer,
        card,
        request_id=request_id,
        drawn_seed=drawn_seed,
        default_max_tokens=_DEFAULT_COMPLETION_TOKENS,
        logprobs=request.logprobs,
        echo=bool(request.echo),
        param="prompt",
    )


def build_chat(
    request: ChatRequest, tokenizer: Tokenizer, card: ModelCard, *, request_id: str, drawn_seed: int
) -> GenerationSpec:
    """The spec of a `/v1/chat/completions` body.

    Raises:
        InvalidRequestError, NotFoundError: names the field and the limit.
    """
    check_model(request.model, card)
    _check_choices(1, request.n or 1)
    continues = bool(request.continue_final_message)
    # A client that continues a message and says nothing else does not want a new header as well.
    header = not continues if request.add_generation_prompt is None else request.add_generation_prompt
    ids = encode_chat(
        request.messages,
        tokenizer,
        card,
        add_generation_prompt=header,
        continue_final_message=continues,
        kwargs=request.chat_template_kwargs,
    )
    if request.max_completion_tokens is not None:
        request = request.model_copy(update={"max_tokens": request.max_completion_tokens})
    return build_spec(
        request,
        [ids],
        tokenizer,
        card,
        request_id=request_id,
        drawn_seed=drawn_seed,
        default_max_tokens=None,
        logprobs=request.num_logprobs,
        echo=False,
        param="messages",
    )


def build_spec(
    fields: SamplingFields,
    prompts: Sequence[tuple[int, ...]],
    tokenizer: Tokenizer,
    card: ModelCard,
    *,
    request_id: str,
    drawn_seed: int,
    default_max_tokens: int | None,
    logprobs: int | None,
    echo: bool,
    param: str,
) -> GenerationSpec:
    """Resolve every default of `fields` for these prompts.

    Args:
        drawn_seed: used where the client sent none.
        default_max_tokens: None gives what the window leaves.
        param: the prompt's field name, for errors.

    Raises:
        InvalidRequestError: a value that only the model's numbers can judge; `ContextLengthError` for the window.
    """
    n = fields.n or 1
    _check_choices(len(prompts), n)
    allowed = fields.allowed_token_ids
    if allowed is not None:
        require(len(allowed) > 0, "allowed_token_ids", "at least one token id", allowed)
        check_ids(allowed, card, "allowed_token_ids")
    check_ids(fields.stop_token_ids or (), card, "stop_token_ids")
    check_ids(list(fields.logit_bias or ()), card, "logit_bias")
    stop_ids, stop = list(fields.stop_token_ids or ()), tuple(dict.fromkeys(fields.stop or ()))
    for text in stop:
        token_id = tokenizer.token_id(text)
        # A stop string that is a special token never shows in the text: its id must end the answer.
        if token_id is not None and token_id in tokenizer.special_ids and token_id not in stop_ids:
            stop_ids.append(token_id)
    prompt_logprobs = fields.prompt_logprobs
    if echo and logprobs is not None:
        prompt_logprobs = max(prompt_logprobs or 0, logprobs)
    seed = drawn_seed if fields.seed is None else fields.seed
    bad_words = _bad_words_ids(fields.bad_words or (), tokenizer)
    choices: list[ChoiceSpec] = []
    for prompt in prompts:
        max_tokens = _max_tokens(len(prompt), fields.max_tokens, default_max_tokens, card, param)
        min_tokens = fields.min_tokens or 0
        require(min_tokens <= max_tokens, "min_tokens", f"at most max_tokens={max_tokens}", min_tokens)
        choices += [
            ChoiceSpec(
                index=len(choices) + copy,
                prompt_token_ids=prompt,
                sampling=SamplingParams(
                    max_tokens=max_tokens,
                    min_tokens=min_tokens,
                    temperature=1.0 if fields.temperature is None else float(fields.temperature),
                    top_k=max(fields.top_k or 0, 0),
                    top_p=1.0 if fields.top_p is None else float(fields.top_p),
                    min_p=float(fields.min_p or 0.0),
                    seed=derived_seed(seed, copy),
                    repetition_penalty=1.0 if fields.repetition_penalty is None else float(fields.repetition_penalty),
                    presence_penalty=float(fields.presence_penalty or 0.0),
                    frequency_penalty=float(fields.frequency_penalty or 0.0),
                    logit_bias=tuple(sorted((fields.logit_bias or {}).items())),
                    allowed_token_ids=None if allowed is None else tuple(dict.fromkeys(allowed)),
                    bad_words_ids=bad_words,
                    stop_token_ids=tuple(dict.fromkeys(stop_ids)),
                    ignore_eos=bool(fields.ignore_eos),
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                ),
            )
            for copy in range(n)
        ]
    return GenerationSpec(
        request_id=request_id,
        choices=tuple(choices),
        n=n,
        stop=stop,
        include_stop=bool(fields.include_stop_str_in_output),
        skip_special_tokens=fields.skip_special_tokens is not False,
        echo=echo,
        priority=fields.priority or 0,
        cache_salt=fields.cache_salt or "",
        priority_class=fields.priority_class or "",
        slo=_slo(fields.slo),
        session_id=fields.session_id or "",
    )


def _slo(fields: SloFields | None) -> Slo | None:
    if fields is None or (fields.ttft_ms is None and fields.tpot_ms is None):
        return None
    return Slo(
        ttft_s=None if fields.ttft_ms is None else fields.ttft_ms / 1000,
        tpot_s=None if fields.tpot_ms is None else fields.tpot_ms / 1000,
    )


def _check_choices(num_prompts: int, n: int) -> None:
    limit = f"at most {limits.MAX_CHOICES} answers in all (prompts x n)"
    require(num_prompts * n <= limits.MAX_CHOICES, "n", limit, num_prompts * n)


def _max_tokens(prompt_tokens: int, asked: int | None, default: int | None, card: ModelCard, param: str) -> int:
    room = card.max_model_len - prompt_tokens
    if room < 1:
        raise ContextLengthError(
            f"the model's window is {card.max_model_len} tokens and the prompt alone has {prompt_tokens};"
            " it must leave room for at least 1",
            param=param,
        )
    if asked is not None:
        if asked > room:
            raise ContextLengthError(
                f"the model's window is {card.max_model_len} tokens, but prompt ({prompt_tokens}) and max_tokens"
                f" ({shown(asked)}) together need {shown(prompt_tokens + asked)}; ask for at most {room}",
                param="max_tokens",
            )
        return asked
    return room if default is None else min(default, room)


def _check_fits_at_all(text: str, tokenizer: Tokenizer, card: ModelCard, param: str) -> None:
    # Encoding megabytes takes seconds; no token stands for more characters than the longest one.
    most = card.max_model_len * tokenizer.max_token_chars
    if len(text) > most:
        raise ContextLengthError(
            f"{param} has {len(text)} characters, more than the model's window of {card.max_model_len} tokens can hold"
            f" ({most})",
            param=param,
        )


def _bad_words_ids(words: Sequence[str], tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    # A word has other tokens inside a sentence (after a space) than at the start of a line.
    forms = [form for word in words for form in (word.lstrip(), " " + word.lstrip())]
    encoded = (tuple(tokenizer.encode(form, add_special_tokens=False)) for form in forms)
    return tuple(dict.fromkeys(ids for ids in encoded if ids))
