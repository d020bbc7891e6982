"""The body of an HTTP request, bounded in size and time while it is read."""

from __future__ import annotations

import asyncio

from starlette.requests import Request

from baton.router import limits
from baton.router.protocol.errors import BodyTimeoutError, BodyTooLargeError, MediaTypeError
from baton.router.protocol.parse import shown

__all__ = ["read_body"]


async def read_body(request: Request) -> bytes:
    """All of it.

    Raises:
        MediaTypeError, BodyTooLargeError, BodyTimeoutError: it is not declared as JSON, or passes a limit.
    """
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise MediaTypeError(f"send the body as Content-Type: application/json, got {shown(media_type)}")
    declared = request.headers.get("content-length", "0")
    too_large = BodyTooLargeError(f"the body is larger than {limits.MAX_BODY_BYTES} bytes")
    if declared.isdecimal() and int(declared[:20]) > limits.MAX_BODY_BYTES:
        raise too_large
    pieces: list[bytes] = []
    num_bytes = 0
    try:
        async with asyncio.timeout(limits.BODY_READ_TIMEOUT_S):
            async for piece in request.stream():
                num_bytes += len(piece)
                if num_bytes > limits.MAX_BODY_BYTES:
                    raise too_large
                pieces.append(piece)
    except TimeoutError:
        raise BodyTimeoutError(
            f"the body did not arrive within {limits.BODY_READ_TIMEOUT_S:.0f} s ({num_bytes} bytes did)"
        ) from None
    return b"".join(pieces)
