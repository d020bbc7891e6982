"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`."""

from __future__ import annotations

import math
from typing import Any

import orjson
from starlette.responses import Response

from baton.errors import (
    BatonError,
    ConflictError,
    InvalidRequestError,
    OverloadedError,
    QuarantinedError,
    UnavailableError,
)

__all__ = ["BadMethodError", "BodyTimeoutError", "BodyTooLargeError", "MediaTypeError", "error_body", "error_response"]

_UNAVAILABLE_RETRY_S = 1


class BadMethodError(InvalidRequestError):
    """There is this path, and not for this method.

    Args:
        allow: the methods that it is for, as the header `Allow` lists them.
    """

    http_status = 405
    code = "bad_method"

    def __init__(self, message: str, *, allow: str) -> None:
        super().__init__(message)
        self.allow = allow


class BodyTooLargeError(InvalidRequestError):
    """The body passes the limit; it is not read to its end."""

    http_status = 413
    code = "request_too_large"


class BodyTimeoutError(InvalidRequestError):
    """The body did not arrive in time."""

    http_status = 408
    code = "request_timeout"


class MediaTypeError(InvalidRequestError):
    """The body is not declared as JSON."""

    http_status = 415
    code = "unsupported_media_type"


def error_body(error: BatonError) -> dict[str, Any]:
    """The JSON object that tells `error`."""
    param = error.param if isinstance(error, InvalidRequestError) else None
    return {"error": {"message": error.message, "type": error.error_type, "param": param, "code": error.code}}


def error_response(error: BatonError) -> Response:
    """`error` as a response, with `Retry-After` where trying again makes sense."""
    headers = {}
    if isinstance(error, OverloadedError | ConflictError):
        headers["Retry-After"] = str(math.ceil(error.retry_after_s))
    elif isinstance(error, UnavailableError):
        headers["Retry-After"] = str(_UNAVAILABLE_RETRY_S)
    elif isinstance(error, QuarantinedError):
        # Clients of OpenAI's repeat what failed with 5xx, and this would kill again.
        headers["X-Should-Retry"] = "false"
    elif isinstance(error, BadMethodError) and error.allow:
        headers["Allow"] = error.allow
    if error.http_status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(error_body(error)), error.http_status, headers, "application/json")
