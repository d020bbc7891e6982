"""Log-probabilities in the shapes of OpenAI's two APIs and of vLLM's prompt log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from baton.engine.request import TokenLogprobs
from baton.engine.tokenizer import Tokenizer
from baton.router.client import ChoiceDelta

__all__ = ["chat_logprobs", "completion_logprobs", "prompt_logprobs"]

_LOWEST = -9999.0  # JSON knows no infinity; OpenAI uses this number


def _finite(logprob: float) -> float:
    return max(logprob, _LOWEST)


def chat_logprobs(entries: Sequence[TokenLogprobs], tokenizer: Tokenizer) -> dict[str, Any]:
    """`choices[].logprobs` of chat completions."""

    def entry(token_id: int, logprob: float) -> dict[str, Any]:
        data = tokenizer.token_bytes(token_id)
        return {"token": data.decode("utf-8", "replace"), "logprob": _finite(logprob), "bytes": list(data)}

    content = [
        {**entry(item.token_id, item.logprob), "top_logprobs": [entry(*alternative) for alternative in item.top]}
        for item in entries
    ]
    return {"content": content, "refusal": None}


def completion_logprobs(delta: ChoiceDelta, tokenizer: Tokenizer, echoed_ids: Sequence[int] = ()) -> dict[str, Any]:
    """`choices[].logprobs` of completions; `echoed_ids` is the prompt where it is echoed with this delta."""
    tokens: list[str] = []
    token_logprobs: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    offsets: list[int] = []
    num_chars = 0
    for token_id, item in zip(echoed_ids, delta.prompt_logprobs or [None] * len(echoed_ids), strict=True):
        tokens.append(tokenizer.token_text(token_id))
        token_logprobs.append(_finite(item.logprob) if item is not None else None)
        tops.append(_top(item, tokenizer) if item is not None else None)
        offsets.append(num_chars)
        num_chars += len(tokens[-1])
    for item in delta.logprobs:
        tokens.append(tokenizer.token_text(item.token_id))
        token_logprobs.append(_finite(item.logprob))
        tops.append(_top(item, tokenizer))
    offsets += delta.text_offsets
    return {"tokens": tokens, "token_logprobs": token_logprobs, "top_logprobs": tops, "text_offset": offsets}


def prompt_logprobs(entries: Sequence[TokenLogprobs | None], tokenizer: Tokenizer) -> list[dict[str, Any] | None]:
    """One object per prompt position (null for the first): token id -> logprob, rank and text."""

    def entry(token_id: int, logprob: float, rank: int) -> dict[str, Any]:
        return {"logprob": _finite(logprob), "rank": rank, "decoded_token": tokenizer.token_text(token_id)}

    out: list[dict[str, Any] | None] = []
    for item in entries:
        if item is None:
            out.append(None)
            continue
        found = {str(token): entry(token, logprob, rank) for rank, (token, logprob) in enumerate(item.top, start=1)}
        found[str(item.token_id)] = entry(item.token_id, item.logprob, item.rank)
        out.append(found)
    return out


def _top(item: TokenLogprobs, tokenizer: Tokenizer) -> dict[str, float]:
    pairs = (*item.top, (item.token_id, item.logprob))
    return {tokenizer.token_text(token_id): _finite(logprob) for token_id, logprob in pairs}
