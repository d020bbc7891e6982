"""Typed errors of Baton, drawn as a tree.

    BatonError
    ├── InvalidRequestError      the client's fault; names the field and the limit       HTTP 400  INVALID_ARGUMENT
    │   ├── ContextLengthError   prompt + max_tokens exceed the model's window           HTTP 400  INVALID_ARGUMENT
    │   └── KeyReuseError        an idempotency key stands for another body              HTTP 422  INVALID_ARGUMENT
    ├── ConflictError            an idempotency key's request is in work                 HTTP 409  ABORTED
    ├── NotFoundError            unknown model or request                                HTTP 404  NOT_FOUND
    ├── AuthenticationError      missing or wrong API key                                HTTP 401  UNAUTHENTICATED
    ├── OverloadedError          queue or KV pool full; carries retry_after_s            HTTP 429  RESOURCE_EXHAUSTED
    ├── DeadlineError            a wait passed its deadline; names phase and peer        HTTP 504  DEADLINE_EXCEEDED
    ├── UnavailableError         no worker can serve this now                            HTTP 503  UNAVAILABLE
    ├── QuarantinedError         the request seems to kill workers                       HTTP 500  ABORTED
    ├── CancelledError           the client left or asked to stop                        HTTP 499  CANCELLED
    ├── ConfigError              cluster.yaml or the command line is wrong
    ├── CheckpointError          the model folder is missing, damaged or unsupported
    └── HandoverError            KV pages could not be handed over; the prompt is computed again locally
        ├── IncompatibleError    peers differ in model, dtype, layout or protocol version
        ├── RefusedError         the decode worker gave the handover up: it goes on without       FAILED_PRECONDITION
        │   └── StaleError       wrong epoch or incarnation: the sender speaks of a past reservation
        └── ChecksumError        pages arrived damaged

Errors of users are of these types and say what happened, where, and what to do; `assert` guards our own bugs.
"""

from __future__ import annotations

__all__ = [
    "AuthenticationError",
    "BatonError",
    "CancelledError",
    "CheckpointError",
    "ChecksumError",
    "ConfigError",
    "ConflictError",
    "ContextLengthError",
    "DeadlineError",
    "HandoverError",
    "IncompatibleError",
    "InvalidRequestError",
    "KeyReuseError",
    "NotFoundError",
    "OverloadedError",
    "QuarantinedError",
    "RefusedError",
    "StaleError",
    "UnavailableError",
]


class BatonError(Exception):
    """Root of every error Baton raises on purpose.

    `code` is the machine-readable word that clients branch on (OpenAI's `error.code`).
    """

    http_status = 500
    grpc_status = "INTERNAL"
    error_type = "server_error"
    code = "internal_error"

    def __init__(self, message: str, *, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        if code is not None:
            self.code = code


class InvalidRequestError(BatonError):
    """A request that cannot be served as it stands. `param` is the offending field's name."""

    http_status = 400
    grpc_status = "INVALID_ARGUMENT"
    error_type = "invalid_request_error"
    code = "invalid_value"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.param = param


class ContextLengthError(InvalidRequestError):
    """Prompt plus requested output does not fit the model's window."""

    code = "context_length_exceeded"


class KeyReuseError(InvalidRequestError):
    """An idempotency key that stands for a request with another body."""

    http_status = 422
    code = "idempotency_key_reused"


class ConflictError(BatonError):
    """The request that an idempotency key stands for is in work. `retry_after_s` is a hint in seconds."""

    http_status = 409
    grpc_status = "ABORTED"
    error_type = "conflict_error"
    code = "idempotency_key_in_use"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class NotFoundError(BatonError):
    """Unknown model, request or route."""

    http_status = 404
    grpc_status = "NOT_FOUND"
    error_type = "invalid_request_error"
    code = "model_not_found"


class AuthenticationError(BatonError):
    """Missing or wrong API key."""

    http_status = 401
    grpc_status = "UNAUTHENTICATED"
    error_type = "authentication_error"
    code = "invalid_api_key"


class OverloadedError(BatonError):
    """Refused early because queues or KV memory are full. `retry_after_s` is an honest hint in seconds."""

    http_status = 429
    grpc_status = "RESOURCE_EXHAUSTED"
    error_type = "rate_limit_error"
    code = "overloaded"

    def __init__(self, message: str, *, retry_after_s: float = 1.0, code: str | None = None) -> None:
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class DeadlineError(BatonError):
    """A wait passed its deadline."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    error_type = "timeout_error"
    code = "deadline_exceeded"


class UnavailableError(BatonError):
    """No worker can serve this request at present."""

    http_status = 503
    grpc_status = "UNAVAILABLE"
    error_type = "service_unavailable_error"
    code = "unavailable"


class CancelledError(BatonError):
    """The client left, or asked to stop."""

    http_status = 499
    grpc_status = "CANCELLED"
    error_type = "cancelled_error"
    code = "cancelled"


class QuarantinedError(BatonError):
    """Workers died as they began this request, more than once: it is not tried again."""

    grpc_status = "ABORTED"
    code = "request_quarantined"


class ConfigError(BatonError):
    """`cluster.yaml` or the command line is wrong."""


class CheckpointError(BatonError):
    """A model folder is missing, damaged or of an unsupported kind. Names the file and the tensor."""


class HandoverError(BatonError):
    """KV pages could not be handed over; the decode worker computes the prompt itself."""


class IncompatibleError(HandoverError):
    """Peers differ in model, dtype, layout or protocol version; the text lists the differences."""


class RefusedError(HandoverError):
    """The decode worker gave the handover up, or refused what it was offered: nobody else need ship the pages."""

    grpc_status = "FAILED_PRECONDITION"


class StaleError(RefusedError):
    """An epoch or incarnation that is not the reservation's."""


class ChecksumError(HandoverError):
    """Pages arrived with another checksum than they were sent with."""
