"""The OpenAI-compatible HTTP interface.

POST /v1/chat/completions  /v1/completions  /tokenize  /detokenize
GET  /v1/models  /v1/models/{id}  /version  /metrics  /metrics/vllm
GET  /livez   the process answers          /readyz  a request sent now would be served (503 otherwise)
     /health  as /livez, and says in its body whether the router is ready          GET|POST /ping

`X-Baton-Tenant: NAME` says whose share a request is served from, where its API key does not.
`X-Request-Timeout: SECONDS` bounds the life of a request; `router.request_timeout_s` bounds it anyway.
`Idempotency-Key: KEY` makes a generation safe to send again: once answered, the same answer comes for the same key and
body for `router.idempotency_ttl_s`, marked `Idempotency-Replayed: true`; while it is in work 409, with another body
422; else it runs, with the tokens that it would have had before. `Idempotency-Status: unavailable` or `not-kept` says
that a retry may compute again (of an answer that is not streamed: a stream's headers leave before that is known).
"""

from __future__ import annotations

import logging
from typing import Any

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response
from starlette.types import ASGIApp

import baton
from baton.errors import BatonError, NotFoundError
from baton.metrics import CONTENT_TYPE
from baton.metrics_server import page_of
from baton.router.body import read_body
from baton.router.frontend import Frontend
from baton.router.generation import Generations
from baton.router.middleware import Gate
from baton.router.protocol.errors import BadMethodError, error_response
from baton.router.protocol.parse import parse_json, shown, validate
from baton.router.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from baton.router.validation import check_ids, check_model

__all__ = ["build_app"]

_log = logging.getLogger(__name__)


def build_app(frontend: Frontend) -> ASGIApp:
    """The ASGI application over `frontend`."""
    app = FastAPI(title="Baton", version=baton.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    _add_error_handlers(app)
    _add_text_routes(app, frontend)
    _add_status_routes(app, frontend)
    return Gate(Generations(app, frontend), frontend)


def _json(content: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(content), status, headers, "application/json")


def _add_error_handlers(app: FastAPI) -> None:
    async def on_baton_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, BatonError)
        if error.http_status >= 500:
            _log.warning("%s %s: %s", request.method, request.url.path, error.message)
        return error_response(error)

    async def on_http_error(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        if error.status_code == 404:
            return error_response(NotFoundError(f"no route {shown(request.url.path)} here", code="not_found"))
        allow = (error.headers or {}).get("Allow", "")
        failure = BadMethodError(f"{request.method} is not for this route: {error.detail}", allow=allow)
        failure.http_status = error.status_code
        return error_response(failure)

    async def on_bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(BatonError("internal error; the router's log has the details"))

    app.add_exception_handler(BatonError, on_baton_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _add_text_routes(app: FastAPI, frontend: Frontend) -> None:
    tokenizer, card = frontend.tokenizer, frontend.card

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_body(request)

        def work() -> dict[str, Any]:
            fields = validate(TokenizeRequest, parse_json(body))
            check_model(fields.model, card)
            if fields.messages is not None:
                continues = bool(fields.continue_final_message)
                header = not continues if fields.add_generation_prompt is None else fields.add_generation_prompt
                ids = tokenizer.apply_chat_template(
                    fields.messages,
                    add_generation_prompt=header,
                    continue_final_message=continues,
                    kwargs=fields.chat_template_kwargs,
                )
            else:
                ids = tokenizer.encode(fields.prompt or "", add_special_tokens=fields.add_special_tokens is not False)
            strings = [tokenizer.token_text(token_id) for token_id in ids] if fields.return_token_strs else None
            return {"count": len(ids), "max_model_len": card.max_model_len, "tokens": ids, "token_strs": strings}

        return _json(await frontend.off_loop(work, num_chars=len(body)))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_body(request)

        def work() -> dict[str, Any]:
            fields = validate(DetokenizeRequest, parse_json(body))
            check_model(fields.model, card)
            check_ids(fields.tokens, card, "tokens")
            return {"prompt": tokenizer.decode(fields.tokens, skip_special_tokens=False)}

        return _json(await frontend.off_loop(work, num_chars=len(body)))


def _add_status_routes(app: FastAPI, frontend: Frontend) -> None:
    card = frontend.card
    model = {
        "id": card.model_id,
        "object": "model",
        "created": card.created_s,
        "owned_by": "baton",
        "root": card.root,
        "parent": None,
        "max_model_len": card.max_model_len,
        "permission": [],
    }

    @app.get("/v1/models")
    async def models() -> Response:
        return _json({"object": "list", "data": [model]})

    @app.get("/v1/models/{model_id:path}")
    async def one_model(model_id: str) -> Response:
        check_model(model_id, card)
        return _json(model)

    @app.get("/version")
    async def version() -> Response:
        return _json({"version": baton.__version__})

    @app.get("/livez")
    async def livez() -> Response:
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        return _json({"ready": frontend.ready}, 200 if frontend.ready else 503)

    @app.get("/health")
    async def health() -> Response:
        return _json({"status": "ok", "ready": frontend.ready})

    @app.api_route("/ping", methods=["GET", "POST"])
    async def ping() -> Response:
        return _json({"status": "ok"}, 200 if frontend.ready else 503)

    pages = frontend.metrics_pages()

    @app.get("/metrics")
    @app.get("/metrics/vllm")
    async def metrics(request: Request) -> Response:
        page = pages.get(page_of(request.url.path, request.url.query))
        if page is None:
            raise NotFoundError("metrics.vllm_aliases is false here", code="not_found")
        return Response(page(), media_type=CONTENT_TYPE)
