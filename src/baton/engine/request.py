"""What a request asks for and what an engine says back: plain values, no torch.

`SamplingParams` arrive fully resolved: the router validates, tokenises `bad_words`, applies defaults and draws a
seed where the client gave none, so that a request can be run again elsewhere and give the same tokens.
Stop *strings* are the router's business (they need text); everything here is about token ids.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass, field

__all__ = ["EngineRequest", "FinishReason", "Phases", "RequestOutput", "SamplingParams", "TokenLogprobs"]


class FinishReason(enum.StrEnum):
    """Why a request ended, as OpenAI names it (`abort` and `error` are Baton's own)."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How tokens are chosen. Order of processing: see `engine/sampler.py`.

    Attributes:
        max_tokens: upper bound of generated tokens, >= 1.
        min_tokens: EOS and `stop_token_ids` are masked until this many tokens are generated.
        temperature: 0 is greedy.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probabilities sum to at least this, in (0, 1].
        min_p: drop tokens less likely than this share of the most likely one, in [0, 1].
        seed: 64-bit key of the counter-based noise.
        repetition_penalty: > 0, over prompt and output tokens; 1 is off.
        presence_penalty, frequency_penalty: in [-2, 2], over output tokens.
        logit_bias: (token id, bias) pairs.
        allowed_token_ids: when not None, nothing else may be sampled.
        bad_words_ids: token sequences that must not appear in the output.
        stop_token_ids: end of the output, besides the model's EOS.
        ignore_eos: do not end at EOS.
        logprobs: number of most likely alternatives per output token; 0 gives the chosen token's only; None is off.
        prompt_logprobs: the same for prompt tokens.
    """

    max_tokens: int
    min_tokens: int = 0
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] | None = None
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """One prompt to continue, as an engine takes it.

    Attributes:
        request_id: unique in the cluster; choices of one client request carry distinct ids.
        attempt: 0 for the first dispatch, counted up by the router at each new dispatch of the same request.
        prompt_token_ids: at least one id.
        priority: lower is served first; ties by arrival.
        cache_salt: keeps prefix-cache entries of one tenant apart from another's.
        resumed_token_ids: output that an earlier attempt has written: computed like a prompt, and counted as output, so
            that noise, penalties and limits go on as if nothing had happened.
        traceparent: W3C trace context of the span that it belongs to; empty: nobody traces it.
    """

    request_id: str
    prompt_token_ids: tuple[int, ...]
    sampling: SamplingParams
    attempt: int = 0
    priority: int = 0
    cache_salt: str = ""
    resumed_token_ids: tuple[int, ...] = ()
    traceparent: str = ""

    @property
    def num_tokens(self) -> int:
        """Tokens that are there before the first new one."""
        return len(self.prompt_token_ids) + len(self.resumed_token_ids)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """Log-probabilities at one position, from unprocessed logits (natural logarithm).

    Attributes:
        token_id, logprob, rank: the chosen (or given) token; rank 1 is the most likely.
        top: (token id, logprob) of the most likely tokens, best first.
    """

    token_id: int
    logprob: float
    rank: int
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """Where the time until the first token went on the workers, see `worker.proto`: one after another, in seconds.

    `first_step_s` comes with the second token, and nothing else then.
    """

    reserve_s: float = 0.0
    prefill_queue_s: float = 0.0
    prefill_s: float = 0.0
    transfer_exposed_s: float = 0.0
    attach_s: float = 0.0
    first_step_s: float = 0.0

    @property
    def until_first_token_s(self) -> float:
        """All but `first_step_s`."""
        return self.reserve_s + self.prefill_queue_s + self.prefill_s + self.transfer_exposed_s + self.attach_s


@dataclass(slots=True, kw_only=True)
class RequestOutput:
    """What one engine step says about one request.

    Attributes:
        token_ids: new output tokens of this step (may be empty when only the end is told).
        logprobs: one entry per token of `token_ids` where asked for, else empty.
        prompt_logprobs: once, with the first token; the first prompt position is None.
        finish_reason: set on the last output.
        stop_token_id: the EOS or stop token that ended the output (it is part of `token_ids`).
        error: message, when `finish_reason` is ERROR.
        cached_tokens: prompt tokens that were found in a prefix cache (told with the first token).
        phases: where the time went, told with the first two tokens of an attempt.
    """

    request_id: str
    attempt: int = 0
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    error: str = ""
    cached_tokens: int = 0
    phases: Phases | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is one token and nothing else."""
        return (
            self.finish_reason is None
            and not self.logprobs
            and len(self.token_ids) == 1
            and self.prompt_logprobs is None
            and not self.cached_tokens
            and not self.error
            and self.stop_token_id is None
            and self.phases is None
        )
