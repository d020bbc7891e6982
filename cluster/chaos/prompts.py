"""The requests of the load: some greedy, some sampled, prompts from a few to some hundred tokens. Pure.

A request is known by its number; asked again it must bring the same tokens. The salt keeps a prompt out of the prefix
cache (tokens do not depend on it), so that prompts are computed and handed over again and again.
"""

from __future__ import annotations

from typing import Any

__all__ = ["NUM_PROMPTS", "body_of", "salted"]

NUM_PROMPTS = 24
_LINES = 28


def body_of(number: int, *, model: str, max_tokens: int) -> dict[str, Any]:
    """The body of request `number` for /v1/completions, streamed, with token ids."""
    lines = "".join(f"value_{number}_{line} = {line * number}\n" for line in range(1 + number * 11 % _LINES))
    sampling: dict[str, Any] = {"temperature": 0}
    if number % 2:
        sampling = {"temperature": 0.9, "seed": number, "top_p": 0.95}
    if number % 6 == 5:
        sampling |= {"presence_penalty": 0.3, "repetition_penalty": 1.1}
    return {
        "model": model,
        "prompt": lines,
        "max_tokens": max_tokens,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        **sampling,
    }


def salted(body: dict[str, Any], salt: str) -> dict[str, Any]:
    """The same request with a prefix cache of its own."""
    return {**body, "cache_salt": salt}
