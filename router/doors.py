"""Where clients come in: the HTTP and the gRPC server of one router, opened and closed together.

    closed --open()--> open --turn_away()--> what runs ends --close()--> closed

Several routers of one machine share both ports (SO_REUSEPORT): the kernel gives each new connection to one of those
that listen. So a router that shares listens only while it can serve: it opens its doors when a decode worker is
connected, and turns new connections away, to the others, as soon as it is told to stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket

import uvicorn

from baton.config import split_host_port
from baton.errors import ConfigError
from baton.router.direct import DirectProtocol
from baton.router.frontend import Frontend
from baton.router.grpc import InferenceServer
from baton.router.http import build_app

__all__ = ["Doors"]

_HTTP_BACKLOG = 2048
_END_TIMEOUT_S = 1


class Doors:
    """The two servers over `frontend`.

    Args:
        http, grpc: host:port to listen on.
        is_shared: other processes listen there too.
        grace_s: how long what runs may take to end after `turn_away`.

    Attributes:
        http_url, grpc_address: where clients come in; empty before `open`.
        inference: the gRPC server, whose health service tells whether this router is ready.
    """

    def __init__(self, frontend: Frontend, *, http: str, grpc: str, is_shared: bool, grace_s: float) -> None:
        self._http = http
        self._grpc = grpc
        self._is_shared = is_shared
        self._grace_s = grace_s
        self.http_url = self.grpc_address = ""
        self.inference = InferenceServer(frontend, shares_port=is_shared)
        config = uvicorn.Config(
            build_app(frontend),
            http=DirectProtocol,
            loop="none",
            lifespan="off",
            ws="none",
            log_config=None,
            log_level="warning",
            access_log=False,
            proxy_headers=False,
            server_header=False,
            backlog=_HTTP_BACKLOG,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=max(_END_TIMEOUT_S, round(grace_s)) if is_shared else _END_TIMEOUT_S,
        )
        self._server = _EmbeddedServer(config)
        self._serving: asyncio.Task[None] | None = None
        self._leaving: asyncio.Task[None] | None = None

    @property
    def are_open(self) -> bool:
        """Whether clients can come in."""
        return self.grpc_address != ""

    async def open(self) -> None:
        """Listen on both.

        Raises:
            ConfigError: an address cannot be listened on.
        """
        listener = _bind(self._http, self._is_shared)
        self._serving = asyncio.create_task(self._server.serve(sockets=[listener]), name="http")
        host, port = listener.getsockname()[:2]
        self.http_url = f"http://{_shown(host)}:{port}"
        try:
            port = await self.inference.start(self._grpc)
        except RuntimeError as error:
            raise ConfigError(f"router.grpc: cannot listen on {self._grpc}: is the port taken?") from error
        self.grpc_address = f"{_shown(split_host_port(self._grpc)[0])}:{port}"

    def turn_away(self) -> None:
        """Where others listen too, stop to: what runs goes on, new connections go to them."""
        if self._is_shared and self.are_open:
            self._server.should_exit = True
            self._leaving = asyncio.create_task(self.inference.stop(self._grace_s), name="grpc leaves")

    async def close(self) -> None:
        """End both servers; what still runs is cut off."""
        if self._leaving is not None:
            self._leaving.cancel()
            await asyncio.gather(self._leaving, return_exceptions=True)
        await self.inference.stop(0.0)
        # One that shares has waited already, after `turn_away`.
        self._server.should_exit, self._server.force_exit = True, self._is_shared
        if self._serving is not None:
            await asyncio.gather(self._serving, return_exceptions=True)


class _EmbeddedServer(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self):  # type: ignore[no-untyped-def]
        """Signals are the process's business, not this server's."""
        yield


def _bind(address: str, is_shared: bool) -> socket.socket:
    host, port = split_host_port(address)
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if is_shared:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ConfigError(f"router.http: cannot listen on {address}: {error.strerror or error}") from error
    listener.listen(_HTTP_BACKLOG)
    listener.setblocking(False)
    return listener


def _shown(host: str) -> str:
    return f"[{host}]" if ":" in host else host
