"""Whether an engine can take a request at all. Routers check what clients say; this is about what reaches a worker.

A request that no router of ours would send (a bug, a damaged message, a stranger at the port) is refused for itself:
no number in it may end the step of all the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from baton.engine.request import EngineRequest, SamplingParams

__all__ = ["why_unfit"]

_MAX_TOP_K = 2**31 - 1


def why_unfit(request: EngineRequest, *, max_model_len: int, vocab_size: int) -> str:
    """Why a request cannot be computed by a model, with the limit and the value given; empty when it can."""
    length = request.num_tokens
    if not 1 <= length < max_model_len or not request.prompt_token_ids:
        given = f"{length} tokens" if request.prompt_token_ids else "no tokens"
        return f"prompt has {given}; 1 to {max_model_len - 1} fit this worker (max_model_len {max_model_len})"
    if max(max(request.prompt_token_ids), max(request.resumed_token_ids, default=0)) >= vocab_size:
        return f"prompt has a token id beyond the vocabulary of {vocab_size}"
    sampling = request.sampling
    if max(_named_ids(sampling), default=0) >= vocab_size:
        return f"sampling parameters name a token id beyond the vocabulary of {vocab_size}"
    if sampling.allowed_token_ids == () or () in sampling.bad_words_ids:
        return "allowed_token_ids and each of bad_words_ids must name a token"
    return _why_out_of_bounds(sampling, vocab_size)


def _named_ids(sampling: SamplingParams) -> Iterable[int]:
    yield from (token_id for token_id, _ in sampling.logit_bias)
    yield from sampling.allowed_token_ids or ()
    yield from sampling.stop_token_ids
    for words in sampling.bad_words_ids:
        yield from words


def _why_out_of_bounds(sampling: SamplingParams, vocab_size: int) -> str:
    infinity = math.inf
    bounds = (
        ("max_tokens", 1, infinity),
        ("temperature", 0.0, infinity),
        ("top_k", 0, _MAX_TOP_K),
        ("top_p", 0.0, 1.0),
        ("min_p", 0.0, 1.0),
        ("repetition_penalty", 0.0, infinity),
        ("presence_penalty", -infinity, infinity),
        ("frequency_penalty", -infinity, infinity),
        ("logprobs", 0, vocab_size),
        ("prompt_logprobs", 0, vocab_size),
    )
    for name, low, high in bounds:
        value = getattr(sampling, name)
        if value is not None and not (low <= value <= high and math.isfinite(value)):
            return f"{name} is {value}; it must be finite, and of {low} to {high}"
    for name in ("top_p", "repetition_penalty"):
        if getattr(sampling, name) == 0:
            return f"{name} is 0; it must be above"
    if not all(math.isfinite(bias) for _, bias in sampling.logit_bias):
        return "logit_bias has a value that is not finite"
    return ""
