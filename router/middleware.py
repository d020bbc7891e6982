"""What happens to every HTTP request before its route: a request id, and the API key on all paths but the public ones.

Denied by default: only a path that equals a public one, character by character, goes in without a key, so no spelling
of another path (`//v1`, `/v1/../x`, encoded slashes) can.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from time import monotonic

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import AuthenticationError
from baton.log import request_context
from baton.router.access_log import log_visit
from baton.router.frontend import Frontend, is_request_id, new_request_id
from baton.router.generation import GENERATION_PATHS
from baton.router.journal import Visit
from baton.router.protocol.errors import error_response

__all__ = ["PUBLIC_PATHS", "Gate"]

PUBLIC_PATHS = frozenset({"/health", "/livez", "/metrics", "/metrics/vllm", "/ping", "/readyz"})


class Gate:
    """ASGI middleware; `scope["state"]["request_id"]` is the request's id, echoed as `X-Request-Id`.

    Args:
        is_admin: it guards `/admin/`: nothing is public, and the key must be the operator's.
    """

    def __init__(self, app: ASGIApp, frontend: Frontend, *, is_admin: bool = False) -> None:
        self._app = app
        self._frontend = frontend
        self._check_key = frontend.check_admin_key if is_admin else frontend.check_key
        self._public_paths: AbstractSet[str] = frozenset() if is_admin else PUBLIC_PATHS

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"").decode("latin-1")
        state = scope.setdefault("state", {})
        state["request_id"] = given if is_request_id(given) else new_request_id()
        visit = None
        if scope["path"] in GENERATION_PATHS:
            visit = state["visit"] = Visit(
                route=f"{scope['method']} {scope['path']}",
                traceparent=headers.get(b"traceparent", b"").decode("latin-1"),
                tracestate=headers.get(b"tracestate", b"").decode("latin-1"),
            )
        began_s, status = monotonic(), 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", state["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        try:
            with request_context(state["request_id"]):
                await self._serve(scope, receive, send_with_id, headers)
        finally:
            if visit is not None and self._frontend.logs_requests:
                # A client that left before any answer has none.
                log_visit(visit, request_id=state["request_id"], status=status or 499, duration_s=monotonic() - began_s)

    async def _serve(self, scope: Scope, receive: Receive, send: Send, headers: dict[bytes, bytes]) -> None:
        if scope["path"] not in self._public_paths:
            try:
                self._check_key(headers.get(b"authorization"))
            except AuthenticationError as error:
                await error_response(error)(scope, receive, send)
                return
        await self._app(scope, receive, send)
