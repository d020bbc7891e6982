"""The port of `/admin/`: open from before a router is ready until it has ended, whatever its other doors do."""

from __future__ import annotations

import asyncio

import uvicorn
from starlette.types import ASGIApp

from baton.router import limits
from baton.router.embedded_server import EmbeddedServer, listen, shown_host

__all__ = ["AdminPort"]

_BACKLOG = 64
_MAX_AT_ONCE = 64
_END_TIMEOUT_S = 1


class AdminPort:
    """Serves `app` on host:port.

    Attributes:
        url: where it is, without a trailing slash; empty before `open`.
    """

    def __init__(self, app: ASGIApp, address: str) -> None:
        self._address = address
        self.url = ""
        config = uvicorn.Config(
            app,
            http="h11",
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_BACKLOG,
            limit_concurrency=_MAX_AT_ONCE,
            h11_max_incomplete_event_size=limits.MAX_HEADER_BYTES,
            timeout_keep_alive=5,
            timeout_graceful_shutdown=_END_TIMEOUT_S,
        )
        self._server = EmbeddedServer(config)
        self._serving: asyncio.Task[None] | None = None

    def open(self) -> None:
        """Listen.

        Raises:
            ConfigError: the address cannot be listened on.
        """
        listener = listen(self._address, setting="router.admin", backlog=_BACKLOG)
        host, port = listener.getsockname()[:2]
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="admin")
        self.url = f"http://{shown_host(host)}:{port}"

    async def close(self) -> None:
        """End; what is being answered is cut off after a second."""
        self._server.should_exit = True
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)
