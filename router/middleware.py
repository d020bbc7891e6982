"""What happens to every HTTP request before its route: a request id, and the API key on all paths but the public ones.

Denied by default: only a path that equals a public one, character by character, goes in without a key, so no spelling
of another path (`//v1`, `/v1/../x`, encoded slashes) can.
"""

from __future__ import annotations

from collections.abc import Set as AbstractSet

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from baton.errors import AuthenticationError
from baton.router.frontend import Frontend, is_request_id, new_request_id
from baton.router.protocol.errors import error_response

__all__ = ["PUBLIC_PATHS", "Gate"]

PUBLIC_PATHS = frozenset({"/health", "/livez", "/metrics", "/ping", "/readyz"})


class Gate:
    """ASGI middleware; `scope["state"]["request_id"]` is the request's id, echoed as `X-Request-Id`.

    Args:
        is_admin: it guards `/admin/`: nothing is public, and the key must be the operator's.
    """

    def __init__(self, app: ASGIApp, frontend: Frontend, *, is_admin: bool = False) -> None:
        self._app = app
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

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                header = (b"x-request-id", state["request_id"].encode())
                message = {**message, "headers": [*message.get("headers", ()), header]}
            await send(message)

        if scope["path"] not in self._public_paths:
            try:
                self._check_key(headers.get(b"authorization"))
            except AuthenticationError as error:
                await error_response(error)(scope, receive, send_with_id)
                return
        await self._app(scope, receive, send_with_id)
