"""POST /v1/chat/completions and /v1/completions: from a body to an answer, streamed or not.

    Generations --these two paths--> read, parse, build a spec --client--> deltas --sse.py, protocol/answers.py--> bytes
         `------everything else----> the application behind it

They do without what FastAPI does for every request before it comes to a route (seven layers, for dependencies and
errors that there are not), which was a tenth of all that this process does for one.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import secrets
import time
from functools import partial
from typing import Any, TypeVar

import orjson
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import ASGIApp, Receive, Send
from starlette.types import Scope as HttpScope

from baton.errors import BatonError, InvalidRequestError
from baton.router import limits
from baton.router.answered_once import Claim, Replay
from baton.router.body import read_body
from baton.router.direct import DirectStream
from baton.router.frontend import Frontend, is_request_id
from baton.router.idempotency import Scope, check_key
from baton.router.protocol.answers import Answer, ChatAnswer, CompletionAnswer
from baton.router.protocol.chat import ChatRequest
from baton.router.protocol.completions import CompletionRequest
from baton.router.protocol.errors import BadMethodError, error_response
from baton.router.protocol.fields import SamplingFields
from baton.router.protocol.parse import parse_json, shown, validate
from baton.router.sse import ClientWatch, EventStream, event_frames, prime, until_gone
from baton.router.validation import GenerationSpec, build_chat, build_completion

__all__ = ["GENERATION_PATHS", "Generations"]

_log = logging.getLogger(__name__)
_TIMEOUT_HEADER = "X-Request-Timeout"
_KEY_HEADER = "Idempotency-Key"
_SESSION_HEADER = "X-Session-ID"
_TENANT_HEADER = "X-Baton-Tenant"
GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
_Fields = TypeVar("_Fields", bound=SamplingFields)


class Generations:
    """ASGI middleware that answers the two itself.

    Args:
        app: what serves the rest.
    """

    def __init__(self, app: ASGIApp, frontend: Frontend) -> None:
        self._app = app
        self._frontend = frontend
        self._handlers = dict(zip(GENERATION_PATHS, (self._chat, self._completions), strict=True))

    async def __call__(self, scope: HttpScope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        handler = self._handlers.get(scope["path"]) if scope["type"] == "http" else None
        if handler is None:
            await self._app(scope, receive, send)
            return
        try:
            if scope["method"] != "POST":
                raise BadMethodError(f"{scope['method']} is not for this route: Method Not Allowed", allow="POST")
            response = await handler(Request(scope, receive, send))
        except ClientDisconnect:
            return  # in the middle of its body
        except BatonError as error:
            if error.http_status >= 500:
                _log.warning("POST %s: %s", scope["path"], error.message)
            response = error_response(error)
        except Exception:
            _log.exception("POST %s failed", scope["path"])
            response = error_response(BatonError("internal error; the router's log has the details"))
        await response(scope, receive, send)

    async def _chat(self, request: Request) -> Response:
        frontend = self._frontend
        frontend.check_open()
        scope, body = _scope(request), await read_body(request)

        parsed = await frontend.off_loop(lambda: validate(ChatRequest, parse_json(body)), num_bytes=len(body))
        fields = _in_session(parsed, request)
        request_id, seed = _request_id(request, fields), _drawn_seed(scope)
        tenant = _tenant(request, frontend)
        if scope is None:  # an answer that is repeated takes nothing of a rate
            frontend.client.check_rate(tenant, fields.token_bounds)

        def build() -> GenerationSpec:
            return build_chat(fields, frontend.tokenizer, frontend.card, request_id=request_id, drawn_seed=seed)

        spec = await frontend.off_loop(build, num_chars=len(body))
        spec = dataclasses.replace(spec, tenant=tenant) if tenant else spec
        return await _answer_once(request, frontend, ChatAnswer(fields, spec, **_frame(frontend)), scope, body)

    async def _completions(self, request: Request) -> Response:
        frontend = self._frontend
        frontend.check_open()
        scope, body = _scope(request), await read_body(request)

        parsed = await frontend.off_loop(lambda: validate(CompletionRequest, parse_json(body)), num_bytes=len(body))
        fields = _in_session(parsed, request)
        request_id, seed = _request_id(request, fields), _drawn_seed(scope)
        tenant = _tenant(request, frontend)
        if scope is None:  # an answer that is repeated takes nothing of a rate
            frontend.client.check_rate(tenant, fields.token_bounds)

        def build() -> GenerationSpec:
            return build_completion(fields, frontend.tokenizer, frontend.card, request_id=request_id, drawn_seed=seed)

        texts = [*(prompt for prompt in fields.prompt if isinstance(prompt, str)), *(fields.bad_words or ())]
        spec = await frontend.off_loop(build, num_chars=sum(map(len, texts)))
        spec = dataclasses.replace(spec, tenant=tenant) if tenant else spec
        return await _answer_once(request, frontend, CompletionAnswer(fields, spec, **_frame(frontend)), scope, body)


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
    client, timeout_s, visit = frontend.client, _timeout_s(request), request.state.visit
    predicted_s = client.check(answer.spec, timeout_s=timeout_s, visit=visit)
    generate = partial(client.generate, answer.spec, timeout_s=timeout_s, visit=visit, predicted_s=predicted_s)
    if answer.is_streamed:
        direct = DirectStream(answer, claim.add if claim else None) if answer.has_plain_chunks else None
        deltas = generate(sink=direct)
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
    deltas = generate()

    async def collect() -> None:
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                answer.add(delta)

    await until_gone(collect(), request)
    response = Response(orjson.dumps(answer.response()), 200, _pair_headers(answer), "application/json")
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


def _tenant(request: Request, frontend: Frontend) -> str:
    headers = request.headers
    return frontend.tenant(headers.get("authorization", ""), headers.get(_TENANT_HEADER, ""), _TENANT_HEADER)


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
