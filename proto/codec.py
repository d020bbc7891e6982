"""Protobuf messages to plain values and back: the only place that does it for requests, tokens, load and layout."""

from __future__ import annotations

from collections.abc import Sequence

from baton.engine.kv_layout import KvLayout
from baton.engine.request import EngineRequest, FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from baton.proto.baton.v1 import worker_pb2 as pb

__all__ = [
    "layout_from_proto",
    "layout_to_proto",
    "logprobs_from_proto",
    "logprobs_to_proto",
    "output_from_proto",
    "output_to_proto",
    "request_from_proto",
    "request_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
]

_PLAIN_SAMPLING_FIELDS = (
    "max_tokens",
    "min_tokens",
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "seed",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
    "ignore_eos",
)


def sampling_to_proto(sampling: SamplingParams) -> pb.SamplingParams:
    """Encodes sampling parameters."""
    message = pb.SamplingParams(
        **{name: getattr(sampling, name) for name in _PLAIN_SAMPLING_FIELDS},
        logit_bias=dict(sampling.logit_bias),
        has_allowed_token_ids=sampling.allowed_token_ids is not None,
        allowed_token_ids=sampling.allowed_token_ids or (),
        bad_words_ids=[pb.TokenSequence(ids=ids) for ids in sampling.bad_words_ids],
        stop_token_ids=sampling.stop_token_ids,
    )
    if sampling.logprobs is not None:
        message.logprobs = sampling.logprobs
    if sampling.prompt_logprobs is not None:
        message.prompt_logprobs = sampling.prompt_logprobs
    return message


def sampling_from_proto(message: pb.SamplingParams) -> SamplingParams:
    """Decodes sampling parameters; `logit_bias` comes back in id order."""
    return SamplingParams(
        **{name: getattr(message, name) for name in _PLAIN_SAMPLING_FIELDS},
        logit_bias=tuple(sorted(message.logit_bias.items())),
        allowed_token_ids=tuple(message.allowed_token_ids) if message.has_allowed_token_ids else None,
        bad_words_ids=tuple(tuple(sequence.ids) for sequence in message.bad_words_ids),
        stop_token_ids=tuple(message.stop_token_ids),
        logprobs=message.logprobs if message.HasField("logprobs") else None,
        prompt_logprobs=message.prompt_logprobs if message.HasField("prompt_logprobs") else None,
    )


def request_to_proto(request: EngineRequest, into: pb.EngineRequest | None = None) -> pb.EngineRequest:
    """Encodes a request; `into` a field of another message, where it shall stand anyway."""
    message = pb.EngineRequest() if into is None else into
    message.request_id = request.request_id
    message.attempt = request.attempt
    message.prompt_token_ids.extend(request.prompt_token_ids)
    message.resumed_token_ids.extend(request.resumed_token_ids)
    message.sampling.CopyFrom(sampling_to_proto(request.sampling))
    message.priority = request.priority
    message.cache_salt = request.cache_salt
    return message


def request_from_proto(message: pb.EngineRequest) -> EngineRequest:
    """Decodes a request."""
    return EngineRequest(
        request_id=message.request_id,
        attempt=message.attempt,
        prompt_token_ids=tuple(message.prompt_token_ids),
        resumed_token_ids=tuple(message.resumed_token_ids),
        sampling=sampling_from_proto(message.sampling),
        priority=message.priority,
        cache_salt=message.cache_salt,
    )


def logprobs_to_proto(logprobs: TokenLogprobs) -> pb.TokenLogprobs:
    """Encodes one position's log-probabilities (fp32 on the wire, as computed)."""
    return pb.TokenLogprobs(
        token_id=logprobs.token_id,
        logprob=logprobs.logprob,
        rank=logprobs.rank,
        top_token_ids=[token_id for token_id, _ in logprobs.top],
        top_logprobs=[logprob for _, logprob in logprobs.top],
    )


def logprobs_from_proto(message: pb.TokenLogprobs) -> TokenLogprobs:
    """Decodes one position's log-probabilities."""
    top = tuple(zip(message.top_token_ids, message.top_logprobs, strict=True))
    return TokenLogprobs(message.token_id, message.logprob, message.rank, top)


def output_to_proto(output: RequestOutput, prefill_instance: str = "") -> pb.RequestOutput:
    """Encodes what a step says about a request."""
    message = pb.RequestOutput(
        request_id=output.request_id,
        attempt=output.attempt,
        token_ids=output.token_ids,
        logprobs=[logprobs_to_proto(entry) for entry in output.logprobs],
        finish_reason=output.finish_reason.value if output.finish_reason else "",
        error=output.error,
        cached_tokens=output.cached_tokens,
        prefill_instance=prefill_instance,
    )
    if output.prompt_logprobs is not None:
        message.has_prompt_logprobs = True
        message.prompt_logprobs.extend(logprobs_to_proto(e) for e in output.prompt_logprobs[1:] if e is not None)
    if output.stop_token_id is not None:
        message.stop_token_id = output.stop_token_id
    return message


def output_from_proto(message: pb.RequestOutput) -> RequestOutput:
    """Decodes what a step says about a request."""
    prompt: Sequence[TokenLogprobs] = [logprobs_from_proto(entry) for entry in message.prompt_logprobs]
    return RequestOutput(
        request_id=message.request_id,
        attempt=message.attempt,
        token_ids=list(message.token_ids),
        logprobs=[logprobs_from_proto(entry) for entry in message.logprobs],
        prompt_logprobs=[None, *prompt] if message.has_prompt_logprobs else None,
        finish_reason=FinishReason(message.finish_reason) if message.finish_reason else None,
        stop_token_id=message.stop_token_id if message.HasField("stop_token_id") else None,
        error=message.error,
        cached_tokens=message.cached_tokens,
    )


def layout_to_proto(layout: KvLayout) -> pb.KvLayout:
    """Encodes a KV layout."""
    return pb.KvLayout(**{name: getattr(layout, name) for name in KvLayout.__dataclass_fields__})


def layout_from_proto(message: pb.KvLayout) -> KvLayout:
    """Decodes a KV layout."""
    values = {name: getattr(message, name) for name in KvLayout.__dataclass_fields__}
    return KvLayout(**values | {"layers_per_stage": tuple(message.layers_per_stage)})
