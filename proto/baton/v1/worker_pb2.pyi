from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Tier(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DEVICE: _ClassVar[Tier]
    HOST: _ClassVar[Tier]
    DISK: _ClassVar[Tier]
DEVICE: Tier
HOST: Tier
DISK: Tier

class SamplingParams(_message.Message):
    __slots__ = ("max_tokens", "min_tokens", "temperature", "top_k", "top_p", "min_p", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty", "logit_bias", "has_allowed_token_ids", "allowed_token_ids", "bad_words_ids", "stop_token_ids", "ignore_eos", "logprobs", "prompt_logprobs")
    class LogitBiasEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: int
        value: float
        def __init__(self, key: _Optional[int] = ..., value: _Optional[float] = ...) -> None: ...
    MAX_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MIN_TOKENS_FIELD_NUMBER: _ClassVar[int]
    TEMPERATURE_FIELD_NUMBER: _ClassVar[int]
    TOP_K_FIELD_NUMBER: _ClassVar[int]
    TOP_P_FIELD_NUMBER: _ClassVar[int]
    MIN_P_FIELD_NUMBER: _ClassVar[int]
    SEED_FIELD_NUMBER: _ClassVar[int]
    REPETITION_PENALTY_FIELD_NUMBER: _ClassVar[int]
    PRESENCE_PENALTY_FIELD_NUMBER: _ClassVar[int]
    FREQUENCY_PENALTY_FIELD_NUMBER: _ClassVar[int]
    LOGIT_BIAS_FIELD_NUMBER: _ClassVar[int]
    HAS_ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    ALLOWED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    BAD_WORDS_IDS_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    IGNORE_EOS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    max_tokens: int
    min_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    seed: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: _containers.ScalarMap[int, float]
    has_allowed_token_ids: bool
    allowed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    bad_words_ids: _containers.RepeatedCompositeFieldContainer[TokenSequence]
    stop_token_ids: _containers.RepeatedScalarFieldContainer[int]
    ignore_eos: bool
    logprobs: int
    prompt_logprobs: int
    def __init__(self, max_tokens: _Optional[int] = ..., min_tokens: _Optional[int] = ..., temperature: _Optional[float] = ..., top_k: _Optional[int] = ..., top_p: _Optional[float] = ..., min_p: _Optional[float] = ..., seed: _Optional[int] = ..., repetition_penalty: _Optional[float] = ..., presence_penalty: _Optional[float] = ..., frequency_penalty: _Optional[float] = ..., logit_bias: _Optional[_Mapping[int, float]] = ..., has_allowed_token_ids: _Optional[bool] = ..., allowed_token_ids: _Optional[_Iterable[int]] = ..., bad_words_ids: _Optional[_Iterable[_Union[TokenSequence, _Mapping]]] = ..., stop_token_ids: _Optional[_Iterable[int]] = ..., ignore_eos: _Optional[bool] = ..., logprobs: _Optional[int] = ..., prompt_logprobs: _Optional[int] = ...) -> None: ...

class TokenSequence(_message.Message):
    __slots__ = ("ids",)
    IDS_FIELD_NUMBER: _ClassVar[int]
    ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, ids: _Optional[_Iterable[int]] = ...) -> None: ...

class EngineRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "prompt_token_ids", "sampling", "priority", "cache_salt", "resumed_token_ids", "traceparent")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    PROMPT_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    SAMPLING_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    CACHE_SALT_FIELD_NUMBER: _ClassVar[int]
    RESUMED_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TRACEPARENT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    prompt_token_ids: _containers.RepeatedScalarFieldContainer[int]
    sampling: SamplingParams
    priority: int
    cache_salt: str
    resumed_token_ids: _containers.RepeatedScalarFieldContainer[int]
    traceparent: str
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., prompt_token_ids: _Optional[_Iterable[int]] = ..., sampling: _Optional[_Union[SamplingParams, _Mapping]] = ..., priority: _Optional[int] = ..., cache_salt: _Optional[str] = ..., resumed_token_ids: _Optional[_Iterable[int]] = ..., traceparent: _Optional[str] = ...) -> None: ...

class TokenLogprobs(_message.Message):
    __slots__ = ("token_id", "logprob", "rank", "top_token_ids", "top_logprobs")
    TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    LOGPROB_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    TOP_TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    TOP_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    token_id: int
    logprob: float
    rank: int
    top_token_ids: _containers.RepeatedScalarFieldContainer[int]
    top_logprobs: _containers.RepeatedScalarFieldContainer[float]
    def __init__(self, token_id: _Optional[int] = ..., logprob: _Optional[float] = ..., rank: _Optional[int] = ..., top_token_ids: _Optional[_Iterable[int]] = ..., top_logprobs: _Optional[_Iterable[float]] = ...) -> None: ...

class RequestOutput(_message.Message):
    __slots__ = ("request_id", "attempt", "token_ids", "logprobs", "has_prompt_logprobs", "prompt_logprobs", "finish_reason", "stop_token_id", "error", "cached_tokens", "prefill_instance", "phases")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    HAS_PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    PROMPT_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    FINISH_REASON_FIELD_NUMBER: _ClassVar[int]
    STOP_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_INSTANCE_FIELD_NUMBER: _ClassVar[int]
    PHASES_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    has_prompt_logprobs: bool
    prompt_logprobs: _containers.RepeatedCompositeFieldContainer[TokenLogprobs]
    finish_reason: str
    stop_token_id: int
    error: str
    cached_tokens: int
    prefill_instance: str
    phases: Phases
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., token_ids: _Optional[_Iterable[int]] = ..., logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., has_prompt_logprobs: _Optional[bool] = ..., prompt_logprobs: _Optional[_Iterable[_Union[TokenLogprobs, _Mapping]]] = ..., finish_reason: _Optional[str] = ..., stop_token_id: _Optional[int] = ..., error: _Optional[str] = ..., cached_tokens: _Optional[int] = ..., prefill_instance: _Optional[str] = ..., phases: _Optional[_Union[Phases, _Mapping]] = ...) -> None: ...

class Phases(_message.Message):
    __slots__ = ("reserve_s", "prefill_queue_s", "prefill_s", "transfer_exposed_s", "attach_s", "first_step_s")
    RESERVE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    TRANSFER_EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    ATTACH_S_FIELD_NUMBER: _ClassVar[int]
    FIRST_STEP_S_FIELD_NUMBER: _ClassVar[int]
    reserve_s: float
    prefill_queue_s: float
    prefill_s: float
    transfer_exposed_s: float
    attach_s: float
    first_step_s: float
    def __init__(self, reserve_s: _Optional[float] = ..., prefill_queue_s: _Optional[float] = ..., prefill_s: _Optional[float] = ..., transfer_exposed_s: _Optional[float] = ..., attach_s: _Optional[float] = ..., first_step_s: _Optional[float] = ...) -> None: ...

class DecodeCommand(_message.Message):
    __slots__ = ("hello", "submit", "cancel", "prefill_failed", "send_snapshot", "seq")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    SUBMIT_FIELD_NUMBER: _ClassVar[int]
    CANCEL_FIELD_NUMBER: _ClassVar[int]
    PREFILL_FAILED_FIELD_NUMBER: _ClassVar[int]
    SEND_SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    hello: Hello
    submit: Submit
    cancel: Cancel
    prefill_failed: PrefillFailed
    send_snapshot: SendSnapshot
    seq: int
    def __init__(self, hello: _Optional[_Union[Hello, _Mapping]] = ..., submit: _Optional[_Union[Submit, _Mapping]] = ..., cancel: _Optional[_Union[Cancel, _Mapping]] = ..., prefill_failed: _Optional[_Union[PrefillFailed, _Mapping]] = ..., send_snapshot: _Optional[_Union[SendSnapshot, _Mapping]] = ..., seq: _Optional[int] = ...) -> None: ...

class SendSnapshot(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class Hello(_message.Message):
    __slots__ = ("router_id", "protocol_version")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    protocol_version: int
    def __init__(self, router_id: _Optional[str] = ..., protocol_version: _Optional[int] = ...) -> None: ...

class Submit(_message.Message):
    __slots__ = ("request", "remote_prefill", "handover_timeout_s", "number")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    REMOTE_PREFILL_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    NUMBER_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    remote_prefill: bool
    handover_timeout_s: float
    number: int
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., remote_prefill: _Optional[bool] = ..., handover_timeout_s: _Optional[float] = ..., number: _Optional[int] = ...) -> None: ...

class Cancel(_message.Message):
    __slots__ = ("request_id", "attempt")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ...) -> None: ...

class PrefillFailed(_message.Message):
    __slots__ = ("request_id", "attempt", "reason", "next_handover")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    NEXT_HANDOVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: str
    next_handover: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., next_handover: _Optional[int] = ...) -> None: ...

class DecodeEvent(_message.Message):
    __slots__ = ("welcome", "step", "beat", "load", "seq", "blocks", "steps")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    STEP_FIELD_NUMBER: _ClassVar[int]
    BEAT_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    welcome: Welcome
    step: StepOutputs
    beat: Beat
    load: WorkerLoad
    seq: int
    blocks: _containers.RepeatedCompositeFieldContainer[BlockEvents]
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    def __init__(self, welcome: _Optional[_Union[Welcome, _Mapping]] = ..., step: _Optional[_Union[StepOutputs, _Mapping]] = ..., beat: _Optional[_Union[Beat, _Mapping]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., seq: _Optional[int] = ..., blocks: _Optional[_Iterable[_Union[BlockEvents, _Mapping]]] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ...) -> None: ...

class WorkerNews(_message.Message):
    __slots__ = ("load", "blocks", "steps", "incarnation")
    LOAD_FIELD_NUMBER: _ClassVar[int]
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    STEPS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    load: WorkerLoad
    blocks: _containers.RepeatedCompositeFieldContainer[BlockEvents]
    steps: _containers.RepeatedCompositeFieldContainer[StepSample]
    incarnation: bytes
    def __init__(self, load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., blocks: _Optional[_Iterable[_Union[BlockEvents, _Mapping]]] = ..., steps: _Optional[_Iterable[_Union[StepSample, _Mapping]]] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class FollowRequest(_message.Message):
    __slots__ = ("router_id",)
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    def __init__(self, router_id: _Optional[str] = ...) -> None: ...

class BlockEvents(_message.Message):
    __slots__ = ("seq", "snapshot", "more", "tier", "stored", "removed", "cleared")
    SEQ_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    MORE_FIELD_NUMBER: _ClassVar[int]
    TIER_FIELD_NUMBER: _ClassVar[int]
    STORED_FIELD_NUMBER: _ClassVar[int]
    REMOVED_FIELD_NUMBER: _ClassVar[int]
    CLEARED_FIELD_NUMBER: _ClassVar[int]
    seq: int
    snapshot: bool
    more: bool
    tier: Tier
    stored: _containers.RepeatedScalarFieldContainer[int]
    removed: _containers.RepeatedScalarFieldContainer[int]
    cleared: bool
    def __init__(self, seq: _Optional[int] = ..., snapshot: _Optional[bool] = ..., more: _Optional[bool] = ..., tier: _Optional[_Union[Tier, str]] = ..., stored: _Optional[_Iterable[int]] = ..., removed: _Optional[_Iterable[int]] = ..., cleared: _Optional[bool] = ...) -> None: ...

class StepSample(_message.Message):
    __slots__ = ("decode_rows", "decode_context_tokens", "prefill_tokens", "prefill_attended_tokens", "step_s")
    DECODE_ROWS_FIELD_NUMBER: _ClassVar[int]
    DECODE_CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_ATTENDED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    decode_rows: int
    decode_context_tokens: int
    prefill_tokens: int
    prefill_attended_tokens: int
    step_s: float
    def __init__(self, decode_rows: _Optional[int] = ..., decode_context_tokens: _Optional[int] = ..., prefill_tokens: _Optional[int] = ..., prefill_attended_tokens: _Optional[int] = ..., step_s: _Optional[float] = ...) -> None: ...

class PendingChoices(_message.Message):
    __slots__ = ("router_id", "choices")
    ROUTER_ID_FIELD_NUMBER: _ClassVar[int]
    CHOICES_FIELD_NUMBER: _ClassVar[int]
    router_id: str
    choices: _containers.RepeatedCompositeFieldContainer[PendingChoice]
    def __init__(self, router_id: _Optional[str] = ..., choices: _Optional[_Iterable[_Union[PendingChoice, _Mapping]]] = ...) -> None: ...

class PendingChoice(_message.Message):
    __slots__ = ("instance_id", "incarnation", "prefill_tokens", "block_keys", "ttl_s")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    BLOCK_KEYS_FIELD_NUMBER: _ClassVar[int]
    TTL_S_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: bytes
    prefill_tokens: int
    block_keys: _containers.RepeatedScalarFieldContainer[int]
    ttl_s: float
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., prefill_tokens: _Optional[int] = ..., block_keys: _Optional[_Iterable[int]] = ..., ttl_s: _Optional[float] = ...) -> None: ...

class Beat(_message.Message):
    __slots__ = ("incarnation",)
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    incarnation: bytes
    def __init__(self, incarnation: _Optional[bytes] = ...) -> None: ...

class Welcome(_message.Message):
    __slots__ = ("instance_id", "incarnation")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: bytes
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class StepOutputs(_message.Message):
    __slots__ = ("outputs", "numbers", "token_ids")
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    NUMBERS_FIELD_NUMBER: _ClassVar[int]
    TOKEN_IDS_FIELD_NUMBER: _ClassVar[int]
    outputs: _containers.RepeatedCompositeFieldContainer[RequestOutput]
    numbers: _containers.RepeatedScalarFieldContainer[int]
    token_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, outputs: _Optional[_Iterable[_Union[RequestOutput, _Mapping]]] = ..., numbers: _Optional[_Iterable[int]] = ..., token_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class WorkerLoad(_message.Message):
    __slots__ = ("running_requests", "waiting_requests", "kv_blocks_total", "kv_blocks_free", "kv_blocks_cached", "kv_blocks_owned", "pending_prefill_tokens", "slowness", "context_tokens", "max_remaining_tokens", "max_running_requests", "preemptions")
    RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    WAITING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_TOTAL_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_FREE_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_CACHED_FIELD_NUMBER: _ClassVar[int]
    KV_BLOCKS_OWNED_FIELD_NUMBER: _ClassVar[int]
    PENDING_PREFILL_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SLOWNESS_FIELD_NUMBER: _ClassVar[int]
    CONTEXT_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_REMAINING_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MAX_RUNNING_REQUESTS_FIELD_NUMBER: _ClassVar[int]
    PREEMPTIONS_FIELD_NUMBER: _ClassVar[int]
    running_requests: int
    waiting_requests: int
    kv_blocks_total: int
    kv_blocks_free: int
    kv_blocks_cached: int
    kv_blocks_owned: int
    pending_prefill_tokens: int
    slowness: float
    context_tokens: int
    max_remaining_tokens: int
    max_running_requests: int
    preemptions: int
    def __init__(self, running_requests: _Optional[int] = ..., waiting_requests: _Optional[int] = ..., kv_blocks_total: _Optional[int] = ..., kv_blocks_free: _Optional[int] = ..., kv_blocks_cached: _Optional[int] = ..., kv_blocks_owned: _Optional[int] = ..., pending_prefill_tokens: _Optional[int] = ..., slowness: _Optional[float] = ..., context_tokens: _Optional[int] = ..., max_remaining_tokens: _Optional[int] = ..., max_running_requests: _Optional[int] = ..., preemptions: _Optional[int] = ...) -> None: ...

class PrefillRequest(_message.Message):
    __slots__ = ("request", "decode_address", "decode_incarnation", "timeout_s", "decode_ranks", "decode_layout", "handover")
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    DECODE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    DECODE_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    DECODE_RANKS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    request: EngineRequest
    decode_address: str
    decode_incarnation: bytes
    timeout_s: float
    decode_ranks: _containers.RepeatedCompositeFieldContainer[RankAddress]
    decode_layout: KvLayout
    handover: int
    def __init__(self, request: _Optional[_Union[EngineRequest, _Mapping]] = ..., decode_address: _Optional[str] = ..., decode_incarnation: _Optional[bytes] = ..., timeout_s: _Optional[float] = ..., decode_ranks: _Optional[_Iterable[_Union[RankAddress, _Mapping]]] = ..., decode_layout: _Optional[_Union[KvLayout, _Mapping]] = ..., handover: _Optional[int] = ...) -> None: ...

class RankAddress(_message.Message):
    __slots__ = ("address", "incarnation")
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    address: str
    incarnation: bytes
    def __init__(self, address: _Optional[str] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class PrefillReply(_message.Message):
    __slots__ = ("cached_tokens", "shipped_bytes", "shipped_tokens", "prefill_s", "exposed_transfer_s", "load", "queue_s")
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_TRANSFER_S_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    cached_tokens: int
    shipped_bytes: int
    shipped_tokens: int
    prefill_s: float
    exposed_transfer_s: float
    load: WorkerLoad
    queue_s: float
    def __init__(self, cached_tokens: _Optional[int] = ..., shipped_bytes: _Optional[int] = ..., shipped_tokens: _Optional[int] = ..., prefill_s: _Optional[float] = ..., exposed_transfer_s: _Optional[float] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., queue_s: _Optional[float] = ...) -> None: ...

class ShipMessage(_message.Message):
    __slots__ = ("hello", "ticket_request", "offer", "complete", "abort", "renewal", "seq")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    TICKET_REQUEST_FIELD_NUMBER: _ClassVar[int]
    OFFER_FIELD_NUMBER: _ClassVar[int]
    COMPLETE_FIELD_NUMBER: _ClassVar[int]
    ABORT_FIELD_NUMBER: _ClassVar[int]
    RENEWAL_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    hello: LinkHello
    ticket_request: TicketRequest
    offer: PageOffer
    complete: ShipComplete
    abort: ShipAbort
    renewal: LeaseRenewal
    seq: int
    def __init__(self, hello: _Optional[_Union[LinkHello, _Mapping]] = ..., ticket_request: _Optional[_Union[TicketRequest, _Mapping]] = ..., offer: _Optional[_Union[PageOffer, _Mapping]] = ..., complete: _Optional[_Union[ShipComplete, _Mapping]] = ..., abort: _Optional[_Union[ShipAbort, _Mapping]] = ..., renewal: _Optional[_Union[LeaseRenewal, _Mapping]] = ..., seq: _Optional[int] = ...) -> None: ...

class ShipReply(_message.Message):
    __slots__ = ("welcome", "ticket", "ack", "settled", "renewal", "seq")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    TICKET_FIELD_NUMBER: _ClassVar[int]
    ACK_FIELD_NUMBER: _ClassVar[int]
    SETTLED_FIELD_NUMBER: _ClassVar[int]
    RENEWAL_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    welcome: LinkWelcome
    ticket: Ticket
    ack: PageAck
    settled: ShipSettled
    renewal: LeaseRenewal
    seq: int
    def __init__(self, welcome: _Optional[_Union[LinkWelcome, _Mapping]] = ..., ticket: _Optional[_Union[Ticket, _Mapping]] = ..., ack: _Optional[_Union[PageAck, _Mapping]] = ..., settled: _Optional[_Union[ShipSettled, _Mapping]] = ..., renewal: _Optional[_Union[LeaseRenewal, _Mapping]] = ..., seq: _Optional[int] = ...) -> None: ...

class KvLayout(_message.Message):
    __slots__ = ("num_layers", "num_kv_heads", "head_dim", "block_size", "dtype", "tensor_parallel", "pipeline_parallel", "layers_per_stage")
    NUM_LAYERS_FIELD_NUMBER: _ClassVar[int]
    NUM_KV_HEADS_FIELD_NUMBER: _ClassVar[int]
    HEAD_DIM_FIELD_NUMBER: _ClassVar[int]
    BLOCK_SIZE_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    TENSOR_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    PIPELINE_PARALLEL_FIELD_NUMBER: _ClassVar[int]
    LAYERS_PER_STAGE_FIELD_NUMBER: _ClassVar[int]
    num_layers: int
    num_kv_heads: int
    head_dim: int
    block_size: int
    dtype: str
    tensor_parallel: int
    pipeline_parallel: int
    layers_per_stage: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, num_layers: _Optional[int] = ..., num_kv_heads: _Optional[int] = ..., head_dim: _Optional[int] = ..., block_size: _Optional[int] = ..., dtype: _Optional[str] = ..., tensor_parallel: _Optional[int] = ..., pipeline_parallel: _Optional[int] = ..., layers_per_stage: _Optional[_Iterable[int]] = ...) -> None: ...

class PeerInfo(_message.Message):
    __slots__ = ("instance_id", "incarnation", "protocol_version", "model_fingerprint", "layout", "host_id", "rank")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    PROTOCOL_VERSION_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    incarnation: bytes
    protocol_version: int
    model_fingerprint: str
    layout: KvLayout
    host_id: str
    rank: int
    def __init__(self, instance_id: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., protocol_version: _Optional[int] = ..., model_fingerprint: _Optional[str] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., host_id: _Optional[str] = ..., rank: _Optional[int] = ...) -> None: ...

class LinkHello(_message.Message):
    __slots__ = ("sender", "transports", "transport_options")
    class TransportOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    SENDER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORTS_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    sender: PeerInfo
    transports: _containers.RepeatedScalarFieldContainer[str]
    transport_options: _containers.ScalarMap[str, str]
    def __init__(self, sender: _Optional[_Union[PeerInfo, _Mapping]] = ..., transports: _Optional[_Iterable[str]] = ..., transport_options: _Optional[_Mapping[str, str]] = ...) -> None: ...

class LinkWelcome(_message.Message):
    __slots__ = ("receiver", "transport", "refusal", "transport_options")
    class TransportOptionsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: str
        def __init__(self, key: _Optional[str] = ..., value: _Optional[str] = ...) -> None: ...
    RECEIVER_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    TRANSPORT_OPTIONS_FIELD_NUMBER: _ClassVar[int]
    receiver: PeerInfo
    transport: str
    refusal: str
    transport_options: _containers.ScalarMap[str, str]
    def __init__(self, receiver: _Optional[_Union[PeerInfo, _Mapping]] = ..., transport: _Optional[str] = ..., refusal: _Optional[str] = ..., transport_options: _Optional[_Mapping[str, str]] = ...) -> None: ...

class TicketRequest(_message.Message):
    __slots__ = ("request_id", "attempt", "receiver_incarnation", "handover")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    receiver_incarnation: bytes
    handover: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., receiver_incarnation: _Optional[bytes] = ..., handover: _Optional[int] = ...) -> None: ...

class Ticket(_message.Message):
    __slots__ = ("request_id", "attempt", "refusal", "reservation_id", "epoch", "receiver_incarnation", "block_ids", "cached_tokens", "num_tokens", "lease_s", "handover")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    RECEIVER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    refusal: str
    reservation_id: int
    epoch: int
    receiver_incarnation: bytes
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: int
    num_tokens: int
    lease_s: float
    handover: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., refusal: _Optional[str] = ..., reservation_id: _Optional[int] = ..., epoch: _Optional[int] = ..., receiver_incarnation: _Optional[bytes] = ..., block_ids: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[int] = ..., num_tokens: _Optional[int] = ..., lease_s: _Optional[float] = ..., handover: _Optional[int] = ...) -> None: ...

class PageOffer(_message.Message):
    __slots__ = ("reservation_id", "epoch", "sender_incarnation", "seq", "layer_begin", "layer_end", "token_begin", "token_end", "head_begin", "head_end", "num_bytes", "checksum", "locator")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SENDER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    LAYER_BEGIN_FIELD_NUMBER: _ClassVar[int]
    LAYER_END_FIELD_NUMBER: _ClassVar[int]
    TOKEN_BEGIN_FIELD_NUMBER: _ClassVar[int]
    TOKEN_END_FIELD_NUMBER: _ClassVar[int]
    HEAD_BEGIN_FIELD_NUMBER: _ClassVar[int]
    HEAD_END_FIELD_NUMBER: _ClassVar[int]
    NUM_BYTES_FIELD_NUMBER: _ClassVar[int]
    CHECKSUM_FIELD_NUMBER: _ClassVar[int]
    LOCATOR_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    epoch: int
    sender_incarnation: bytes
    seq: int
    layer_begin: int
    layer_end: int
    token_begin: int
    token_end: int
    head_begin: int
    head_end: int
    num_bytes: int
    checksum: int
    locator: str
    def __init__(self, reservation_id: _Optional[int] = ..., epoch: _Optional[int] = ..., sender_incarnation: _Optional[bytes] = ..., seq: _Optional[int] = ..., layer_begin: _Optional[int] = ..., layer_end: _Optional[int] = ..., token_begin: _Optional[int] = ..., token_end: _Optional[int] = ..., head_begin: _Optional[int] = ..., head_end: _Optional[int] = ..., num_bytes: _Optional[int] = ..., checksum: _Optional[int] = ..., locator: _Optional[str] = ...) -> None: ...

class PageAck(_message.Message):
    __slots__ = ("reservation_id", "epoch", "seq", "refusal")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SEQ_FIELD_NUMBER: _ClassVar[int]
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    epoch: int
    seq: int
    refusal: str
    def __init__(self, reservation_id: _Optional[int] = ..., epoch: _Optional[int] = ..., seq: _Optional[int] = ..., refusal: _Optional[str] = ...) -> None: ...

class ShipComplete(_message.Message):
    __slots__ = ("reservation_id", "epoch", "sender_incarnation", "num_offers", "first_token_id", "first_token_logprobs", "cached_tokens", "prefill_s", "queue_s", "sampled_ago_s")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    SENDER_INCARNATION_FIELD_NUMBER: _ClassVar[int]
    NUM_OFFERS_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_ID_FIELD_NUMBER: _ClassVar[int]
    FIRST_TOKEN_LOGPROBS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    PREFILL_S_FIELD_NUMBER: _ClassVar[int]
    QUEUE_S_FIELD_NUMBER: _ClassVar[int]
    SAMPLED_AGO_S_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    epoch: int
    sender_incarnation: bytes
    num_offers: int
    first_token_id: int
    first_token_logprobs: TokenLogprobs
    cached_tokens: int
    prefill_s: float
    queue_s: float
    sampled_ago_s: float
    def __init__(self, reservation_id: _Optional[int] = ..., epoch: _Optional[int] = ..., sender_incarnation: _Optional[bytes] = ..., num_offers: _Optional[int] = ..., first_token_id: _Optional[int] = ..., first_token_logprobs: _Optional[_Union[TokenLogprobs, _Mapping]] = ..., cached_tokens: _Optional[int] = ..., prefill_s: _Optional[float] = ..., queue_s: _Optional[float] = ..., sampled_ago_s: _Optional[float] = ...) -> None: ...

class ShipAbort(_message.Message):
    __slots__ = ("reservation_id", "epoch", "request_id", "attempt", "reason", "handover")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    epoch: int
    request_id: str
    attempt: int
    reason: str
    handover: int
    def __init__(self, reservation_id: _Optional[int] = ..., epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., handover: _Optional[int] = ...) -> None: ...

class ShipSettled(_message.Message):
    __slots__ = ("reservation_id", "epoch", "request_id", "attempt", "reason", "handover")
    RESERVATION_ID_FIELD_NUMBER: _ClassVar[int]
    EPOCH_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    reservation_id: int
    epoch: int
    request_id: str
    attempt: int
    reason: str
    handover: int
    def __init__(self, reservation_id: _Optional[int] = ..., epoch: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., handover: _Optional[int] = ...) -> None: ...

class LeaseRenewal(_message.Message):
    __slots__ = ("reservation_ids",)
    RESERVATION_IDS_FIELD_NUMBER: _ClassVar[int]
    reservation_ids: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, reservation_ids: _Optional[_Iterable[int]] = ...) -> None: ...

class RankEvent(_message.Message):
    __slots__ = ("hello", "progress", "ready", "failed", "part", "figures", "stopping", "links_warm")
    HELLO_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    READY_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    PART_FIELD_NUMBER: _ClassVar[int]
    FIGURES_FIELD_NUMBER: _ClassVar[int]
    STOPPING_FIELD_NUMBER: _ClassVar[int]
    LINKS_WARM_FIELD_NUMBER: _ClassVar[int]
    hello: RankHello
    progress: RankProgress
    ready: RankReady
    failed: RankFailed
    part: PartEvent
    figures: RankFigures
    stopping: RankStopping
    links_warm: LinksWarm
    def __init__(self, hello: _Optional[_Union[RankHello, _Mapping]] = ..., progress: _Optional[_Union[RankProgress, _Mapping]] = ..., ready: _Optional[_Union[RankReady, _Mapping]] = ..., failed: _Optional[_Union[RankFailed, _Mapping]] = ..., part: _Optional[_Union[PartEvent, _Mapping]] = ..., figures: _Optional[_Union[RankFigures, _Mapping]] = ..., stopping: _Optional[_Union[RankStopping, _Mapping]] = ..., links_warm: _Optional[_Union[LinksWarm, _Mapping]] = ...) -> None: ...

class RankCommand(_message.Message):
    __slots__ = ("welcome", "open_reservation", "cancel_reservation", "begin_shipment", "abort_shipment", "forget_shipment", "stop", "warm_links")
    WELCOME_FIELD_NUMBER: _ClassVar[int]
    OPEN_RESERVATION_FIELD_NUMBER: _ClassVar[int]
    CANCEL_RESERVATION_FIELD_NUMBER: _ClassVar[int]
    BEGIN_SHIPMENT_FIELD_NUMBER: _ClassVar[int]
    ABORT_SHIPMENT_FIELD_NUMBER: _ClassVar[int]
    FORGET_SHIPMENT_FIELD_NUMBER: _ClassVar[int]
    STOP_FIELD_NUMBER: _ClassVar[int]
    WARM_LINKS_FIELD_NUMBER: _ClassVar[int]
    welcome: RankWelcome
    open_reservation: OpenReservation
    cancel_reservation: CancelReservation
    begin_shipment: BeginShipment
    abort_shipment: AbortShipment
    forget_shipment: ForgetShipment
    stop: StopRank
    warm_links: WarmLinks
    def __init__(self, welcome: _Optional[_Union[RankWelcome, _Mapping]] = ..., open_reservation: _Optional[_Union[OpenReservation, _Mapping]] = ..., cancel_reservation: _Optional[_Union[CancelReservation, _Mapping]] = ..., begin_shipment: _Optional[_Union[BeginShipment, _Mapping]] = ..., abort_shipment: _Optional[_Union[AbortShipment, _Mapping]] = ..., forget_shipment: _Optional[_Union[ForgetShipment, _Mapping]] = ..., stop: _Optional[_Union[StopRank, _Mapping]] = ..., warm_links: _Optional[_Union[WarmLinks, _Mapping]] = ...) -> None: ...

class RankHello(_message.Message):
    __slots__ = ("instance_id", "start_id", "rank", "pid", "incarnation", "host")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_ID_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    start_id: str
    rank: int
    pid: int
    incarnation: bytes
    host: str
    def __init__(self, instance_id: _Optional[str] = ..., start_id: _Optional[str] = ..., rank: _Optional[int] = ..., pid: _Optional[int] = ..., incarnation: _Optional[bytes] = ..., host: _Optional[str] = ...) -> None: ...

class RankWelcome(_message.Message):
    __slots__ = ("refusal", "store_address", "group_name")
    REFUSAL_FIELD_NUMBER: _ClassVar[int]
    STORE_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    GROUP_NAME_FIELD_NUMBER: _ClassVar[int]
    refusal: str
    store_address: str
    group_name: str
    def __init__(self, refusal: _Optional[str] = ..., store_address: _Optional[str] = ..., group_name: _Optional[str] = ...) -> None: ...

class RankProgress(_message.Message):
    __slots__ = ("detail", "progress")
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    detail: str
    progress: float
    def __init__(self, detail: _Optional[str] = ..., progress: _Optional[float] = ...) -> None: ...

class RankReady(_message.Message):
    __slots__ = ("address",)
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    address: str
    def __init__(self, address: _Optional[str] = ...) -> None: ...

class RankFigures(_message.Message):
    __slots__ = ("steps", "step_s", "bubble_s", "busy_s")
    STEPS_FIELD_NUMBER: _ClassVar[int]
    STEP_S_FIELD_NUMBER: _ClassVar[int]
    BUBBLE_S_FIELD_NUMBER: _ClassVar[int]
    BUSY_S_FIELD_NUMBER: _ClassVar[int]
    steps: int
    step_s: float
    bubble_s: float
    busy_s: float
    def __init__(self, steps: _Optional[int] = ..., step_s: _Optional[float] = ..., bubble_s: _Optional[float] = ..., busy_s: _Optional[float] = ...) -> None: ...

class RankStopping(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankFailed(_message.Message):
    __slots__ = ("reason",)
    REASON_FIELD_NUMBER: _ClassVar[int]
    reason: str
    def __init__(self, reason: _Optional[str] = ...) -> None: ...

class PartEvent(_message.Message):
    __slots__ = ("request_id", "attempt", "kind", "reason", "shipped_bytes", "shipped_tokens", "exposed_s", "handover", "by_peer")
    class Kind(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
        __slots__ = ()
        KIND_UNSPECIFIED: _ClassVar[PartEvent.Kind]
        LANDED: _ClassVar[PartEvent.Kind]
        FAILED: _ClassVar[PartEvent.Kind]
        SETTLED: _ClassVar[PartEvent.Kind]
        REFUSED: _ClassVar[PartEvent.Kind]
    KIND_UNSPECIFIED: PartEvent.Kind
    LANDED: PartEvent.Kind
    FAILED: PartEvent.Kind
    SETTLED: PartEvent.Kind
    REFUSED: PartEvent.Kind
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    KIND_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_BYTES_FIELD_NUMBER: _ClassVar[int]
    SHIPPED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    EXPOSED_S_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    BY_PEER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    kind: PartEvent.Kind
    reason: str
    shipped_bytes: int
    shipped_tokens: int
    exposed_s: float
    handover: int
    by_peer: bool
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., kind: _Optional[_Union[PartEvent.Kind, str]] = ..., reason: _Optional[str] = ..., shipped_bytes: _Optional[int] = ..., shipped_tokens: _Optional[int] = ..., exposed_s: _Optional[float] = ..., handover: _Optional[int] = ..., by_peer: _Optional[bool] = ...) -> None: ...

class OpenReservation(_message.Message):
    __slots__ = ("request_id", "attempt", "block_ids", "cached_tokens", "num_tokens", "handover")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    BLOCK_IDS_FIELD_NUMBER: _ClassVar[int]
    CACHED_TOKENS_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    block_ids: _containers.RepeatedScalarFieldContainer[int]
    cached_tokens: int
    num_tokens: int
    handover: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., block_ids: _Optional[_Iterable[int]] = ..., cached_tokens: _Optional[int] = ..., num_tokens: _Optional[int] = ..., handover: _Optional[int] = ...) -> None: ...

class CancelReservation(_message.Message):
    __slots__ = ("request_id", "attempt", "reason", "handover")
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    request_id: str
    attempt: int
    reason: str
    handover: int
    def __init__(self, request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., reason: _Optional[str] = ..., handover: _Optional[int] = ...) -> None: ...

class BeginShipment(_message.Message):
    __slots__ = ("tag", "request_id", "attempt", "decode_ranks", "decode_layout", "timeout_s", "num_tokens", "in_one_message", "handover")
    TAG_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    ATTEMPT_FIELD_NUMBER: _ClassVar[int]
    DECODE_RANKS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    NUM_TOKENS_FIELD_NUMBER: _ClassVar[int]
    IN_ONE_MESSAGE_FIELD_NUMBER: _ClassVar[int]
    HANDOVER_FIELD_NUMBER: _ClassVar[int]
    tag: int
    request_id: str
    attempt: int
    decode_ranks: _containers.RepeatedCompositeFieldContainer[RankAddress]
    decode_layout: KvLayout
    timeout_s: float
    num_tokens: int
    in_one_message: bool
    handover: int
    def __init__(self, tag: _Optional[int] = ..., request_id: _Optional[str] = ..., attempt: _Optional[int] = ..., decode_ranks: _Optional[_Iterable[_Union[RankAddress, _Mapping]]] = ..., decode_layout: _Optional[_Union[KvLayout, _Mapping]] = ..., timeout_s: _Optional[float] = ..., num_tokens: _Optional[int] = ..., in_one_message: _Optional[bool] = ..., handover: _Optional[int] = ...) -> None: ...

class AbortShipment(_message.Message):
    __slots__ = ("tag", "reason")
    TAG_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    tag: int
    reason: str
    def __init__(self, tag: _Optional[int] = ..., reason: _Optional[str] = ...) -> None: ...

class ForgetShipment(_message.Message):
    __slots__ = ("tag",)
    TAG_FIELD_NUMBER: _ClassVar[int]
    tag: int
    def __init__(self, tag: _Optional[int] = ...) -> None: ...

class StopRank(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class WarmLinks(_message.Message):
    __slots__ = ("serial", "decode_ranks", "decode_layout")
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    DECODE_RANKS_FIELD_NUMBER: _ClassVar[int]
    DECODE_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    serial: int
    decode_ranks: _containers.RepeatedCompositeFieldContainer[RankAddress]
    decode_layout: KvLayout
    def __init__(self, serial: _Optional[int] = ..., decode_ranks: _Optional[_Iterable[_Union[RankAddress, _Mapping]]] = ..., decode_layout: _Optional[_Union[KvLayout, _Mapping]] = ...) -> None: ...

class LinksWarm(_message.Message):
    __slots__ = ("serial",)
    SERIAL_FIELD_NUMBER: _ClassVar[int]
    serial: int
    def __init__(self, serial: _Optional[int] = ...) -> None: ...

class GetStatusRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class RankStatus(_message.Message):
    __slots__ = ("rank", "pid", "address", "incarnation", "host")
    RANK_FIELD_NUMBER: _ClassVar[int]
    PID_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    HOST_FIELD_NUMBER: _ClassVar[int]
    rank: int
    pid: int
    address: str
    incarnation: bytes
    host: str
    def __init__(self, rank: _Optional[int] = ..., pid: _Optional[int] = ..., address: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., host: _Optional[str] = ...) -> None: ...

class WorkerStatus(_message.Message):
    __slots__ = ("instance_id", "role", "state", "incarnation", "address", "metrics_url", "ranks", "load", "layout", "model_fingerprint", "detail", "progress", "http_url", "grpc_address", "max_model_len", "admin_url", "host_id", "lends_cores")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    ROLE_FIELD_NUMBER: _ClassVar[int]
    STATE_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    ADDRESS_FIELD_NUMBER: _ClassVar[int]
    METRICS_URL_FIELD_NUMBER: _ClassVar[int]
    RANKS_FIELD_NUMBER: _ClassVar[int]
    LOAD_FIELD_NUMBER: _ClassVar[int]
    LAYOUT_FIELD_NUMBER: _ClassVar[int]
    MODEL_FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    PROGRESS_FIELD_NUMBER: _ClassVar[int]
    HTTP_URL_FIELD_NUMBER: _ClassVar[int]
    GRPC_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    MAX_MODEL_LEN_FIELD_NUMBER: _ClassVar[int]
    ADMIN_URL_FIELD_NUMBER: _ClassVar[int]
    HOST_ID_FIELD_NUMBER: _ClassVar[int]
    LENDS_CORES_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    role: str
    state: str
    incarnation: bytes
    address: str
    metrics_url: str
    ranks: _containers.RepeatedCompositeFieldContainer[RankStatus]
    load: WorkerLoad
    layout: KvLayout
    model_fingerprint: str
    detail: str
    progress: float
    http_url: str
    grpc_address: str
    max_model_len: int
    admin_url: str
    host_id: str
    lends_cores: bool
    def __init__(self, instance_id: _Optional[str] = ..., role: _Optional[str] = ..., state: _Optional[str] = ..., incarnation: _Optional[bytes] = ..., address: _Optional[str] = ..., metrics_url: _Optional[str] = ..., ranks: _Optional[_Iterable[_Union[RankStatus, _Mapping]]] = ..., load: _Optional[_Union[WorkerLoad, _Mapping]] = ..., layout: _Optional[_Union[KvLayout, _Mapping]] = ..., model_fingerprint: _Optional[str] = ..., detail: _Optional[str] = ..., progress: _Optional[float] = ..., http_url: _Optional[str] = ..., grpc_address: _Optional[str] = ..., max_model_len: _Optional[int] = ..., admin_url: _Optional[str] = ..., host_id: _Optional[str] = ..., lends_cores: _Optional[bool] = ...) -> None: ...

class ShutdownRequest(_message.Message):
    __slots__ = ("grace_s",)
    GRACE_S_FIELD_NUMBER: _ClassVar[int]
    grace_s: float
    def __init__(self, grace_s: _Optional[float] = ...) -> None: ...

class ShutdownReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class SetFaultsRequest(_message.Message):
    __slots__ = ("rules",)
    RULES_FIELD_NUMBER: _ClassVar[int]
    rules: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, rules: _Optional[_Iterable[str]] = ...) -> None: ...

class SetFaultsReply(_message.Message):
    __slots__ = ("fired",)
    FIRED_FIELD_NUMBER: _ClassVar[int]
    fired: _containers.RepeatedCompositeFieldContainer[FiredFault]
    def __init__(self, fired: _Optional[_Iterable[_Union[FiredFault, _Mapping]]] = ...) -> None: ...

class FiredFault(_message.Message):
    __slots__ = ("rule", "count")
    RULE_FIELD_NUMBER: _ClassVar[int]
    COUNT_FIELD_NUMBER: _ClassVar[int]
    rule: str
    count: int
    def __init__(self, rule: _Optional[str] = ..., count: _Optional[int] = ...) -> None: ...

class AnnounceReply(_message.Message):
    __slots__ = ("lease_s",)
    LEASE_S_FIELD_NUMBER: _ClassVar[int]
    lease_s: float
    def __init__(self, lease_s: _Optional[float] = ...) -> None: ...

class MeetRequest(_message.Message):
    __slots__ = ("instance_id", "start_id", "driver_address", "timeout_s")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    START_ID_FIELD_NUMBER: _ClassVar[int]
    DRIVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_S_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    start_id: str
    driver_address: str
    timeout_s: float
    def __init__(self, instance_id: _Optional[str] = ..., start_id: _Optional[str] = ..., driver_address: _Optional[str] = ..., timeout_s: _Optional[float] = ...) -> None: ...

class MeetReply(_message.Message):
    __slots__ = ("driver_address",)
    DRIVER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    driver_address: str
    def __init__(self, driver_address: _Optional[str] = ...) -> None: ...

class WatchRequest(_message.Message):
    __slots__ = ("watcher_id",)
    WATCHER_ID_FIELD_NUMBER: _ClassVar[int]
    watcher_id: str
    def __init__(self, watcher_id: _Optional[str] = ...) -> None: ...

class InstanceList(_message.Message):
    __slots__ = ("version", "instances", "cluster_name", "controller_address", "launcher", "is_partial", "incarnation")
    VERSION_FIELD_NUMBER: _ClassVar[int]
    INSTANCES_FIELD_NUMBER: _ClassVar[int]
    CLUSTER_NAME_FIELD_NUMBER: _ClassVar[int]
    CONTROLLER_ADDRESS_FIELD_NUMBER: _ClassVar[int]
    LAUNCHER_FIELD_NUMBER: _ClassVar[int]
    IS_PARTIAL_FIELD_NUMBER: _ClassVar[int]
    INCARNATION_FIELD_NUMBER: _ClassVar[int]
    version: int
    instances: _containers.RepeatedCompositeFieldContainer[WorkerStatus]
    cluster_name: str
    controller_address: str
    launcher: str
    is_partial: bool
    incarnation: bytes
    def __init__(self, version: _Optional[int] = ..., instances: _Optional[_Iterable[_Union[WorkerStatus, _Mapping]]] = ..., cluster_name: _Optional[str] = ..., controller_address: _Optional[str] = ..., launcher: _Optional[str] = ..., is_partial: _Optional[bool] = ..., incarnation: _Optional[bytes] = ...) -> None: ...

class GetClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class HoldRequest(_message.Message):
    __slots__ = ("instance_id", "held")
    INSTANCE_ID_FIELD_NUMBER: _ClassVar[int]
    HELD_FIELD_NUMBER: _ClassVar[int]
    instance_id: str
    held: bool
    def __init__(self, instance_id: _Optional[str] = ..., held: _Optional[bool] = ...) -> None: ...

class HoldReply(_message.Message):
    __slots__ = ("held",)
    HELD_FIELD_NUMBER: _ClassVar[int]
    held: _containers.RepeatedScalarFieldContainer[str]
    def __init__(self, held: _Optional[_Iterable[str]] = ...) -> None: ...

class StopClusterRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class StopClusterReply(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...
