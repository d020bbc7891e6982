"""`/admin/` of one router, on a port of its own: what it decided, where time went, what it knows, what is in work.

GET  /admin/explain/{request_id}   the candidates of each attempt, every score, and why        `baton explain`
     /admin/trace/{request_id}     where the request's time went                               `baton trace`
     /admin/instances              every worker as this router sees it                         `baton top`
     /admin/requests?limit=200     what is in work, and what each waits for
     /admin/routing                policy, weights, how fresh the prefix index is
     /admin/costs                  the cost model's fits and their errors
POST /admin/abort/{request_id}     ends a request; its client gets an error

`request_id` is what `X-Request-Id` of the answer says, or the unique id of one choice, as in the workers' logs. Every
route wants the API key where there is one. Answers are bounded; nothing here waits for anything.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import orjson
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from baton.errors import BatonError, InvalidRequestError, NotFoundError
from baton.router.admin_views import MAX_LISTED, instances_dict, requests_dict
from baton.router.frontend import Frontend, is_request_id
from baton.router.middleware import Gate
from baton.router.protocol.errors import error_response
from baton.router.protocol.parse import shown

__all__ = ["AdminSources", "build_admin"]

_log = logging.getLogger(__name__)
_LISTED = 200


class Trace(Protocol):
    """Finds where the time of a request went."""

    def __call__(self, request_id: str) -> Mapping[str, Any] | None:
        """As JSON; None: not known here."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AdminSources:
    """What is told.

    Attributes:
        router_id: of this router.
        trace: of one request.
        about: what is known of a worker besides what the table holds.
        routing, costs: the policy's settings and state, and the cost model's, as JSON.
    """

    router_id: str
    frontend: Frontend
    trace: Trace
    about: Callable[[str], Mapping[str, Any]]
    routing: Callable[[], Mapping[str, Any]]
    costs: Callable[[], Mapping[str, Any]]


def build_admin(sources: AdminSources) -> Starlette:
    """The ASGI application over `sources`."""
    handlers = _Handlers(sources)
    routes = [
        Route("/admin/", handlers.index),
        Route("/admin/explain/{request_id}", handlers.explain),
        Route("/admin/trace/{request_id}", handlers.trace),
        Route("/admin/instances", handlers.instances),
        Route("/admin/requests", handlers.requests),
        Route("/admin/routing", handlers.routing),
        Route("/admin/costs", handlers.costs),
        Route("/admin/abort/{request_id}", handlers.abort, methods=["POST"]),
    ]
    return Starlette(
        routes=routes,
        middleware=[Middleware(Gate, frontend=sources.frontend, is_admin=True)],
        exception_handlers={BatonError: _on_baton_error, HTTPException: _on_http_error, Exception: _on_bug},
    )


class _Handlers:
    def __init__(self, sources: AdminSources) -> None:
        self._sources = sources
        self._client = sources.frontend.client
        self._dispatcher = sources.frontend.dispatcher

    async def index(self, request: Request) -> Response:
        """What there is."""
        names = ("explain/{request_id}", "trace/{request_id}", "instances", "requests", "routing", "costs")
        told = {"get": [f"/admin/{name}" for name in names], "post": ["/admin/abort/{request_id}"]}
        return self._json({"routes": told})

    async def explain(self, request: Request) -> Response:
        """Why it went where it went."""
        request_id, store, now_s = _request_id(request), self._dispatcher.decisions, _now_s()
        found = store.find(request_id)
        if not found.decisions:
            oldest_s = store.oldest_s()
            reach = f", back to {now_s - oldest_s:.0f} s ago" if oldest_s is not None else ""
            raise NotFoundError(
                f"{self._sources.router_id} knows no decision about {shown(request_id)}: it keeps those of its last"
                f" {store.max_kept} attempts{reach}; another router may have served it",
                code="request_not_found",
            )
        return self._json(
            {
                "request_id": request_id,
                "decisions": [recorded.as_dict(now_s) for recorded in found.decisions],
                "left_out": found.left_out,
                "namesakes": found.namesakes,
            }
        )

    async def trace(self, request: Request) -> Response:
        """Where its time went."""
        request_id = _request_id(request)
        found = self._sources.trace(request_id)
        if found is None:
            raise NotFoundError(
                f"{self._sources.router_id} keeps no trace of {shown(request_id)}: the newest requests push out the"
                " oldest; another router may have served it",
                code="request_not_found",
            )
        return self._json(found)

    async def instances(self, request: Request) -> Response:
        """Every worker."""
        return self._json(instances_dict(self._sources.frontend.table.all(), self._sources.about))

    async def requests(self, request: Request) -> Response:
        """What is in work."""
        limit, total = _limit(request), self._client.num_running
        return self._json(requests_dict(self._client.running(), total=total, limit=limit, now_s=_now_s()))

    async def routing(self, request: Request) -> Response:
        """How workers are chosen."""
        return self._json(self._sources.routing())

    async def costs(self, request: Request) -> Response:
        """What the cost model has learned."""
        return self._json(self._sources.costs())

    async def abort(self, request: Request) -> Response:
        """End it."""
        if "origin" in request.headers:
            # A page in somebody's browser can post to a loopback port, though not read what it answers.
            raise InvalidRequestError("requests from web pages are refused here", code="cross_origin")
        request_id = _request_id(request)
        self._client.abort(request_id)
        _log.info("%s was aborted through /admin/", request_id)
        return self._json({"aborted": request_id})

    def _json(self, content: Mapping[str, Any]) -> Response:
        body = orjson.dumps({"router": self._sources.router_id, **content}, default=_plain)
        return Response(body, media_type="application/json")


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(value)
    raise TypeError(type(value).__name__)


def _now_s() -> float:
    return asyncio.get_running_loop().time()


def _request_id(request: Request) -> str:
    request_id = str(request.path_params["request_id"])
    # The unique id of a choice is a little longer than a public one may be.
    if not is_request_id(request_id) and not is_request_id(request_id.rpartition("-")[0].rpartition("-")[0]):
        raise InvalidRequestError(f"{shown(request_id)} cannot be the id of a request", code="bad_request_id")
    return request_id


def _limit(request: Request) -> int:
    text = request.query_params.get("limit", str(_LISTED))
    if not text.isascii() or not text.isdecimal() or len(text) > 6 or not 0 < int(text) <= MAX_LISTED:
        raise InvalidRequestError(f"limit must be from 1 to {MAX_LISTED}, got {shown(text)}", param="limit")
    return int(text)


async def _on_baton_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, BatonError)
    return error_response(error)


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    if error.status_code == 404:
        return error_response(NotFoundError(f"no route {shown(request.url.path)} here; see /admin/", code="not_found"))
    failure = InvalidRequestError(f"{request.method} is not for this route", code="bad_method")
    failure.http_status = error.status_code
    return error_response(failure)


async def _on_bug(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return error_response(BatonError("internal error; the router's log has the details"))
