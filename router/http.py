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

import asyncio
import contextlib
import dataclasses
import logging
import math
import secrets
import time
from typing import Any, TypeVar

import orjson
from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import Response

import baton
from baton.errors import BatonError, InvalidRequestError, NotFoundError
from baton.metrics import CONTENT_TYPE
from baton.metrics_server import page_of
from baton.router import limits
from baton.router.answered_once import Claim, Replay
from baton.router.direct import DirectStream
from baton.router.frontend import Frontend, is_request_id
from baton.router.idempotency import Scope, check_key
from baton.router.middleware import Gate
from baton.router.protocol.answers import Answer, ChatAnswer, CompletionAnswer
from baton.router.protocol.chat import ChatRequest
from baton.router.protocol.completions import CompletionRequest
from baton.router.protocol.errors import BodyTimeoutError, BodyTooLargeError, MediaTypeError, error_response
from baton.router.protocol.fields import SamplingFields
from baton.router.protocol.parse import parse_json, shown, validate
from baton.router.protocol.tokenize import DetokenizeRequest, TokenizeRequest
from baton.router.sse import ClientWatch, EventStream, event_frames, prime, until_gone
from baton.router.validation import (
    GenerationSpec,
    build_chat,
    build_completion,
    check_ids,
    check_model,
)

__all__ = ["build_app"]

_log = logging.getLogger(__name__)
_TIMEOUT_HEADER = "X-Request-Timeout"
_KEY_HEADER = "Idempotency-Key"
_SESSION_HEADER = "X-Session-ID"
_TENANT_HEADER = "X-Baton-Tenant"
_Fields = TypeVar("_Fields", bound=SamplingFields)


def build_app(frontend: Frontend) -> FastAPI:
    """The ASGI application over `frontend`."""
    app = FastAPI(title="Baton", version=baton.__version__, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Gate, frontend=frontend)
    _add_error_handlers(app)
    _add_generation_routes(app, frontend)
    _add_text_routes(app, frontend)
    _add_status_routes(app, frontend)
    return app


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
        failure = InvalidRequestError(f"{request.method} is not for this route: {error.detail}", code="bad_method")
        failure.http_status = error.status_code
        return error_response(failure)

    async def on_bug(request: Request, error: Exception) -> Response:
        _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
        return error_response(BatonError("internal error; the router's log has the details"))

    app.add_exception_handler(BatonError, on_baton_error)
    app.add_exception_handler(HTTPException, on_http_error)
    app.add_exception_handler(Exception, on_bug)


def _add_generation_routes(app: FastAPI, frontend: Frontend) -> None:
    # Starlette's plain routes: FastAPI's own would resolve dependencies that there are not, for every request.
    async def chat(request: Request) -> Response:
        frontend.check_open()
        scope, body = _scope(request), await _read_body(request)

        parsed = await frontend.off_loop(lambda: validate(ChatRequest, parse_json(body)), num_bytes=len(body))
        fields = _in_session(parsed, request)
        request_id, seed = _request_id(request, fields), _drawn_seed(scope)

        def build() -> GenerationSpec:
            return build_chat(fields, frontend.tokenizer, frontend.card, request_id=request_id, drawn_seed=seed)

        spec = await frontend.off_loop(build, num_chars=len(body))
        spec = _of_tenant(request, frontend, spec)
        return await _answer_once(request, frontend, ChatAnswer(fields, spec, **_frame(frontend)), scope, body)

    async def completions(request: Request) -> Response:
        frontend.check_open()
        scope, body = _scope(request), await _read_body(request)

        parsed = await frontend.off_loop(lambda: validate(CompletionRequest, parse_json(body)), num_bytes=len(body))
        fields = _in_session(parsed, request)
        request_id, seed = _request_id(request, fields), _drawn_seed(scope)

        def build() -> GenerationSpec:
            return build_completion(fields, frontend.tokenizer, frontend.card, request_id=request_id, drawn_seed=seed)

        texts = [*(prompt for prompt in fields.prompt if isinstance(prompt, str)), *(fields.bad_words or ())]
        spec = await frontend.off_loop(build, num_chars=sum(map(len, texts)))
        spec = _of_tenant(request, frontend, spec)
        return await _answer_once(request, frontend, CompletionAnswer(fields, spec, **_frame(frontend)), scope, body)

    app.add_route("/v1/chat/completions", chat, methods=["POST"])
    app.add_route("/v1/completions", completions, methods=["POST"])


def _frame(frontend: Frontend) -> dict[str, Any]:
    """What all answers are made with."""
    return {"tokenizer": frontend.tokenizer, "model": frontend.card.model_id, "created_s": int(time.time())}


async def _answer_once(
    request: Request, frontend: Frontend, answer: Answer, scope: Scope | None, body: bytes
) -> Response:
    """The answer; that of an earlier request where the idempotency key was seen before."""
    if scope is None:
        return await _answer(request, frontend, answer, None)
    found = await frontend.once.begin(scope, body)
    if isinstance(found, Replay):
        return Response(found.answer, headers={**found.headers, "Idempotency-Replayed": "true"})
    try:
        return await _answer(request, frontend, answer, found)
    except BaseException:
        await found.release()
        raise


async def _answer(request: Request, frontend: Frontend, answer: Answer, claim: Claim | None) -> Response:
    timeout_s = _timeout_s(request)
    if answer.is_streamed:
        direct = DirectStream(answer, claim.add if claim else None) if answer.has_plain_chunks else None
        deltas = frontend.client.generate(answer.spec, timeout_s=timeout_s, sink=direct, visit=request.state.visit)
        watch = ClientWatch(request.receive)
        try:
            first, primed = await prime(deltas, watch)
        except BaseException:
            await watch.close()
            raise
        if first is not None:
            answer.usage.add(first)
        headers = {**_pair_headers(answer), **_claim_headers(claim)}
        return EventStream(event_frames(answer, primed, claim), primed, headers, watch, direct, claim)
    deltas = frontend.client.generate(answer.spec, timeout_s=timeout_s, visit=request.state.visit)

    async def collect() -> None:
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                answer.add(delta)

    await until_gone(collect(), request)
    response = _json(answer.response(), headers=_pair_headers(answer))
    if claim is not None:
        claim.add(bytes(response.body))
        await claim.keep({**_pair_headers(answer), "Content-Type": "application/json"})
        await claim.release()
        response.headers.update(_claim_headers(claim))
    return response


def _scope(request: Request) -> Scope | None:
    """Whose idempotency key came, if one did."""
    keys = request.headers.getlist(_KEY_HEADER)
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequestError(f"{_KEY_HEADER} came {len(keys)} times; send one", param=_KEY_HEADER)
    caller = request.headers.get("authorization", "").partition(" ")[2].strip()
    return Scope(caller.encode(), request.url.path, check_key(keys[0]))


def _in_session(fields: _Fields, request: Request) -> _Fields:
    """The fields, with the session that the header names where the body names none."""
    if fields.session_id is None and (given := request.headers.get(_SESSION_HEADER)):
        if len(given) > limits.MAX_SESSION_ID_CHARS:
            raise InvalidRequestError(
                f"{_SESSION_HEADER} must have at most {limits.MAX_SESSION_ID_CHARS} characters, got {len(given)}",
                param=_SESSION_HEADER,
            )
        fields.session_id = given
    return fields


def _drawn_seed(scope: Scope | None) -> int:
    """For a request that sends no seed."""
    return secrets.randbits(64) if scope is None else scope.seed


def _claim_headers(claim: Claim | None) -> dict[str, str]:
    return {"Idempotency-Status": claim.status} if claim is not None and claim.status else {}


def _of_tenant(request: Request, frontend: Frontend, spec: GenerationSpec) -> GenerationSpec:
    headers = request.headers
    tenant = frontend.tenant(headers.get("authorization", ""), headers.get(_TENANT_HEADER, ""), _TENANT_HEADER)
    return dataclasses.replace(spec, tenant=tenant) if tenant else spec


def _timeout_s(request: Request) -> float | None:
    """How long the client will wait, from the header of that name."""
    text = request.headers.get(_TIMEOUT_HEADER)
    if text is None:
        return None
    try:
        timeout_s = float(text)
    except ValueError:
        timeout_s = math.nan
    if not 0 < timeout_s < math.inf:
        raise InvalidRequestError(
            f"{_TIMEOUT_HEADER} must be a positive number of seconds, got {shown(text)}", param=_TIMEOUT_HEADER
        )
    return timeout_s


def _pair_headers(answer: Answer) -> dict[str, str]:
    pair = answer.usage.pair
    names = {"X-Baton-Prefill-Instance": "prefill_instance", "X-Baton-Decode-Instance": "decode_instance"}
    return {header: pair[key] for header, key in names.items() if pair[key]}


def _add_text_routes(app: FastAPI, frontend: Frontend) -> None:
    tokenizer, card = frontend.tokenizer, frontend.card

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await _read_body(request)

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
        body = await _read_body(request)

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


def _request_id(request: Request, fields: SamplingFields) -> str:
    if fields.request_id is None:
        return str(request.state.request_id)
    if not is_request_id(fields.request_id):
        raise InvalidRequestError(
            f"request_id must be 1 to {limits.MAX_REQUEST_ID_CHARS} characters of A-Z a-z 0-9 . _ : -,"
            f" got {shown(fields.request_id)}",
            param="request_id",
        )
    request.state.request_id = fields.request_id
    return fields.request_id


async def _read_body(request: Request) -> bytes:
    """The body, bounded in size and time while it is read."""
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
