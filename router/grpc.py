"""`baton.v1.Inference` over gRPC, with health and reflection; the same checks and the same client as HTTP.

Health: "" is liveness, "baton.v1.Inference" readiness. A call's deadline is the request's deadline, its cancellation
stops the work. Every method but health needs the API key, as metadata `authorization: Bearer KEY`. Generate takes
metadata `x-baton-tenant`, which says what `options.tenant` does, and `idempotency-key`, with the meaning of the HTTP
header; a replay says `idempotency-replayed: true` in its initial metadata, a key that is not honoured
`idempotency-status` in its trailing metadata.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import secrets
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Iterator
from time import monotonic
from typing import Any, NoReturn

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

import baton
from baton.engine.request import TokenLogprobs
from baton.engine.tokenizer import Tokenizer
from baton.errors import BatonError, ConflictError, InvalidRequestError, OverloadedError
from baton.log import mark_task
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.proto.baton.v1 import inference_pb2_grpc as rpc
from baton.router import limits
from baton.router.access_log import log_visit
from baton.router.answered_once import Claim, Replay
from baton.router.channels import server_options
from baton.router.client import ChoiceDelta
from baton.router.frontend import Frontend, is_request_id, new_request_id
from baton.router.idempotency import Scope, check_key
from baton.router.journal import Visit
from baton.router.protocol.chat import check_messages
from baton.router.protocol.fields import SamplingFields
from baton.router.protocol.parse import shown, validate
from baton.router.validation import (
    GenerationSpec,
    build_spec,
    check_ids,
    check_model,
    encode_chat,
    encode_prompt,
)

__all__ = ["InferenceServer"]

_log = logging.getLogger(__name__)
_SERVICE = pb.DESCRIPTOR.services_by_name["Inference"].full_name
_HEALTH_PREFIX = "/grpc.health.v1.Health/"
_DEFAULT_TEXT_TOKENS = 16
_DEADLINE_MARGIN_S = 0.3
_DEADLINE_MARGIN_SHARE = 0.1
_LENGTH = struct.Struct(">I")
_Context = Any  # grpc.aio.ServicerContext, whose published types differ between versions


class InferenceServer:
    """The gRPC server of one router.

    Args:
        frontend: what requests are served with.
        shares_port: other routers listen on the same port.
    """

    def __init__(self, frontend: Frontend, *, shares_port: bool = False) -> None:
        self._frontend = frontend
        self._health = health.aio.HealthServicer()  # type: ignore[attr-defined]
        options = server_options(shares_port=shares_port)
        self._server = grpc.aio.server(interceptors=[_KeyGate(frontend)], options=options)
        rpc.add_InferenceServicer_to_server(_Inference(frontend), self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        names = (_SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, self._server)

    async def start(self, address: str) -> int:
        """Listen on host:port and return the port.

        Raises:
            RuntimeError: the address cannot be had.
        """
        port: int = self._server.add_insecure_port(address)
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)
        await self.update_health()
        await self._server.start()
        return port

    async def update_health(self) -> None:
        """Publish whether the router is ready."""
        kind = health_pb2.HealthCheckResponse
        await self._health.set(_SERVICE, kind.SERVING if self._frontend.ready else kind.NOT_SERVING)

    async def stop(self, grace_s: float) -> None:
        """Tell watchers, let running calls end within `grace_s`, then cancel them."""
        await self._health.enter_graceful_shutdown()
        await self._server.stop(grace_s)


class _KeyGate(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], handler_call_details: Any) -> Any:
        """Replace the method by a refusal unless the call carries the key."""
        if not handler_call_details.method.startswith(_HEALTH_PREFIX):
            metadata = dict(handler_call_details.invocation_metadata or ())
            given = metadata.get("authorization", "")
            try:
                self._frontend.check_key(given.encode() if isinstance(given, str) else given)
            except BatonError as error:
                return grpc.unary_unary_rpc_method_handler(_refusing(error))
        return await continuation(handler_call_details)


def _refusing(error: BatonError) -> Callable[[Any, _Context], Awaitable[Any]]:
    async def refuse(request: Any, context: _Context) -> None:
        await _abort(context, error)

    return refuse


async def _abort(context: _Context, error: BatonError) -> NoReturn:
    trailers = [("error-code", error.code)]
    if isinstance(error, InvalidRequestError) and error.param:
        trailers.append(("error-param", error.param.encode("ascii", "replace").decode()))
    if isinstance(error, OverloadedError | ConflictError):
        trailers.append(("retry-after-s", f"{error.retry_after_s:.0f}"))
    await context.abort(grpc.StatusCode[error.grpc_status], error.message, tuple(trailers))
    raise AssertionError("abort returns never")


@contextlib.asynccontextmanager
async def _mapped(context: _Context) -> AsyncIterator[None]:
    """Baton's errors as status codes."""
    try:
        yield
    except BatonError as error:
        await _abort(context, error)
    except (asyncio.CancelledError, grpc.aio.AbortError):
        raise
    except Exception:
        _log.exception("a gRPC call failed")
        await _abort(context, BatonError("internal error; the router's log has the details"))


class _Inference(rpc.InferenceServicer):
    def __init__(self, frontend: Frontend) -> None:
        self._frontend = frontend

    async def Generate(self, request: pb.GenerateRequest, context: _Context) -> AsyncIterator[pb.GenerateResponse]:
        """Stream the answer, or with `stream` false one message per choice."""
        frontend = self._frontend
        visit = _visit(context)
        request_id = request.request_id if is_request_id(request.request_id) else new_request_id()
        async with _mapped(context), _logged(visit, request_id, frontend.logs_requests):
            frontend.check_open()
            scope = _scope(context)
            if request.request_id:
                _check_request_id(request.request_id)
            seed = secrets.randbits(64) if scope is None else scope.seed
            num_bytes = request.ByteSize()
            spec = await frontend.off_loop(
                lambda: _spec(request, frontend, request_id, seed),
                num_bytes=num_bytes,
                num_chars=num_bytes - request.token_ids.ByteSize(),
            )
            tenant = _tenant(context, frontend, request.options.tenant)
            spec = dataclasses.replace(spec, tenant=tenant) if tenant else spec
            timeout_s = _timeout_s(context)
            if scope is None:
                messages = self._answer(request, spec, timeout_s, visit)
                async with contextlib.aclosing(messages):
                    async for message in messages:
                        yield message
                return
            found = await frontend.once.begin(scope, request.SerializeToString(deterministic=True))
            if isinstance(found, Replay):
                await context.send_initial_metadata((("idempotency-replayed", "true"),))
                for message in _unpacked(found.answer):
                    yield message
                return
            messages = self._kept(self._answer(request, spec, timeout_s, visit), found)
            try:
                async with contextlib.aclosing(messages):
                    async for message in messages:
                        yield message
                if found.status:
                    context.set_trailing_metadata((("idempotency-status", found.status),))
            finally:
                await found.release()

    async def _answer(
        self, request: pb.GenerateRequest, spec: GenerationSpec, timeout_s: float | None, visit: Visit
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        if request.request_id and self._frontend.client.is_running(spec.request_id):
            raise InvalidRequestError(
                f"the request {spec.request_id!r} is running already; choose another id", param="request_id"
            )
        deltas = self._frontend.client.generate(spec, timeout_s=timeout_s, visit=visit)
        wholes: dict[int, pb.GenerateResponse] = {}
        async with contextlib.aclosing(deltas):
            async for delta in deltas:
                message = _response(delta, spec.request_id, self._frontend.tokenizer)
                if delta.finish_reason and delta.timing is not None and request.options.include_timing:
                    message.timing.CopyFrom(pb.Timing(**delta.timing.as_dict()))
                if not request.stream:
                    message = _merged(wholes, message)
                    if not delta.finish_reason:
                        continue
                elif not (message.text or message.token_ids or message.finish_reason):
                    continue
                yield message

    async def _kept(
        self, messages: AsyncGenerator[pb.GenerateResponse, None], claim: Claim
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        """The messages, of which the last one comes once all are kept for who repeats the key."""
        held: pb.GenerateResponse | None = None
        async with contextlib.aclosing(messages):
            async for message in messages:
                claim.add(_packed(message))
                if held is not None:
                    yield held
                    held = None
                if message.finish_reason:
                    held = message
                else:
                    yield message
        await claim.keep({})
        if held is not None:
            yield held

    async def Tokenize(self, request: pb.TokenizeRequest, context: _Context) -> pb.TokenizeResponse:
        """Token ids of a text or a conversation."""
        frontend = self._frontend

        def work() -> list[int]:
            check_model(request.model, frontend.card)
            if request.WhichOneof("prompt") == "messages":
                return frontend.tokenizer.apply_chat_template(_messages(request.messages))
            add_special = request.add_special_tokens if request.HasField("add_special_tokens") else True
            return frontend.tokenizer.encode(request.text, add_special_tokens=add_special)

        async with _mapped(context):
            ids = await frontend.off_loop(work, num_chars=request.ByteSize())
            return pb.TokenizeResponse(token_ids=ids, max_model_len=frontend.card.max_model_len)

    async def Detokenize(self, request: pb.DetokenizeRequest, context: _Context) -> pb.DetokenizeResponse:
        """Text of token ids."""
        frontend = self._frontend

        def work() -> str:
            check_model(request.model, frontend.card)
            check_ids(request.token_ids, frontend.card, "token_ids")
            return frontend.tokenizer.decode(request.token_ids, skip_special_tokens=False)

        async with _mapped(context):
            return pb.DetokenizeResponse(text=await frontend.off_loop(work, num_chars=request.ByteSize()))

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:
        """Stop a running request."""
        async with _mapped(context):
            self._frontend.client.abort(request.request_id[: limits.MAX_REQUEST_ID_CHARS])
            return pb.AbortResponse()

    async def GetModelInfo(self, request: pb.GetModelInfoRequest, context: _Context) -> pb.GetModelInfoResponse:
        """The served model."""
        card = self._frontend.card
        return pb.GetModelInfoResponse(
            id=card.model_id,
            max_model_len=card.max_model_len,
            vocab_size=card.vocab_size,
            eos_token_ids=card.eos_token_ids,
            dtype=card.dtype,
        )

    async def GetServerInfo(self, request: pb.GetServerInfoRequest, context: _Context) -> pb.GetServerInfoResponse:
        """Version and workers."""
        instances = [
            pb.Instance(
                id=instance.instance_id,
                role=instance.status.role,
                # A worker may call itself ready while this router has no stream to it.
                state=instance.status.state if instance.connected else "unreachable",
                running_requests=instance.load.running_requests,
                waiting_requests=instance.load.waiting_requests,
                kv_blocks_total=instance.load.kv_blocks_total,
                kv_blocks_free=instance.load.kv_blocks_free,
                kv_blocks_cached=instance.load.kv_blocks_cached,
                kv_blocks_owned=instance.load.kv_blocks_owned,
                kv_block_size=instance.block_size,
            )
            for instance in self._frontend.table.all()
        ]
        return pb.GetServerInfoResponse(version=baton.__version__, instances=instances)


def _check_request_id(given: str) -> None:
    if not is_request_id(given):
        raise InvalidRequestError(
            f"request_id must be 1 to {limits.MAX_REQUEST_ID_CHARS} characters of A-Z a-z 0-9 . _ : -,"
            f" got {shown(given)}",
            param="request_id",
        )


def _visit(context: _Context) -> Visit:
    given = {str(name): str(value) for name, value in context.invocation_metadata() or ()}
    return Visit(route="Generate", traceparent=given.get("traceparent", ""), tracestate=given.get("tracestate", ""))


@contextlib.asynccontextmanager
async def _logged(visit: Visit, request_id: str, is_wanted: bool) -> AsyncIterator[None]:
    """The call's line in the log, and its id on all that is logged meanwhile."""
    began_s, status = monotonic(), "CANCELLED"
    mark_task(request_id)
    try:
        yield
        status = "OK"
    except BatonError as error:
        status = error.grpc_status
        raise
    finally:
        if is_wanted:
            log_visit(visit, request_id=request_id, status=status, duration_s=monotonic() - began_s)


def _scope(context: _Context) -> Scope | None:
    """Whose idempotency key came, if one did."""
    metadata = context.invocation_metadata() or ()
    keys = [value for name, value in metadata if name == "idempotency-key"]
    if not keys:
        return None
    if len(keys) > 1:
        raise InvalidRequestError(f"idempotency-key came {len(keys)} times; send one", param="Idempotency-Key")
    given = str(dict(metadata).get("authorization", ""))
    return Scope(given.partition(" ")[2].strip().encode(), "Generate", check_key(str(keys[0])))


def _tenant(context: _Context, frontend: Frontend, asked: str) -> str:
    """Whose request it is."""
    metadata = dict(context.invocation_metadata() or ())
    told = str(metadata.get("x-baton-tenant", ""))
    if asked and told and asked != told:
        raise InvalidRequestError(
            f"options.tenant must be the x-baton-tenant of the metadata ({shown(told)}), got {shown(asked)}",
            param="tenant",
        )
    return frontend.tenant(str(metadata.get("authorization", "")), asked or told, "tenant")


def _timeout_s(context: _Context) -> float | None:
    """The call's deadline, a little early: what was waited for is to be told before the client gives up."""
    remaining_s: float | None = context.time_remaining()
    return None if remaining_s is None else remaining_s - min(_DEADLINE_MARGIN_S, _DEADLINE_MARGIN_SHARE * remaining_s)


def _packed(message: pb.GenerateResponse) -> bytes:
    data = message.SerializeToString()
    return _LENGTH.pack(len(data)) + data


def _unpacked(answer: bytes) -> Iterator[pb.GenerateResponse]:
    while answer:
        end = _LENGTH.size + _LENGTH.unpack_from(answer)[0]
        yield pb.GenerateResponse.FromString(answer[_LENGTH.size : end])
        answer = answer[end:]


def _messages(messages: pb.ChatMessages) -> list[dict[str, Any]]:
    return check_messages([{"role": message.role, "content": message.content} for message in messages.messages])


def _spec(request: pb.GenerateRequest, frontend: Frontend, request_id: str, drawn_seed: int) -> GenerationSpec:
    tokenizer, card, options = frontend.tokenizer, frontend.card, request.options
    check_model(request.model, card)
    fields = validate(SamplingFields, _options(options))
    kind = request.WhichOneof("prompt")
    if kind is None:
        raise InvalidRequestError("prompt must be given: text, messages or token_ids", param="prompt")
    if kind == "messages":
        ids = encode_chat(_messages(request.messages), tokenizer, card)
    else:
        prompt = request.text if kind == "text" else list(request.token_ids.ids)
        ids = encode_prompt(prompt, tokenizer, card, param=kind)
    logprobs = _at_most_logprobs(options, "logprobs")
    return build_spec(
        fields,
        [ids],
        tokenizer,
        card,
        request_id=request_id,
        drawn_seed=drawn_seed,
        default_max_tokens=None if kind == "messages" else _DEFAULT_TEXT_TOKENS,
        logprobs=logprobs,
        echo=options.echo,
        param=kind,
    )


def _at_most_logprobs(options: pb.GenerationOptions, name: str) -> int | None:
    if not options.HasField(name):
        return None
    value: int = getattr(options, name)
    if value > limits.MAX_LOGPROBS:
        raise InvalidRequestError(f"{name} must be at most {limits.MAX_LOGPROBS}, got {value}", param=name)
    return value


def _options(options: pb.GenerationOptions) -> dict[str, Any]:
    """The fields that are set, as the shared model reads them."""
    fields: dict[str, Any] = {}
    for descriptor, value in options.ListFields():
        name = descriptor.name
        if name in ("logprobs", "echo", "tenant"):
            continue
        if name == "slo":
            fields[name] = {part.name: number for part, number in value.ListFields()}
            continue
        if name == "logit_bias":
            fields[name] = dict(value)
        elif isinstance(value, bool | int | float | str):
            fields[name] = value
        else:
            fields[name] = list(value)
    return fields


def _response(delta: ChoiceDelta, request_id: str, tokenizer: Tokenizer) -> pb.GenerateResponse:
    message = pb.GenerateResponse(
        request_id=request_id,
        index=delta.index,
        text=delta.text,
        token_ids=delta.token_ids,
        logprobs=[_logprob(item, tokenizer) for item in delta.logprobs],
        prompt_logprobs=[_logprob(item, tokenizer) for item in delta.prompt_logprobs or () if item is not None],
        finish_reason=delta.finish_reason or "",
        matched_stop=delta.matched_stop or "",
        prefill_instance=delta.prefill_instance,
        decode_instance=delta.decode_instance,
    )
    if delta.finish_reason:
        message.usage.CopyFrom(
            pb.Usage(
                prompt_tokens=delta.prompt_tokens,
                completion_tokens=delta.completion_tokens,
                cached_tokens=delta.cached_tokens,
            )
        )
    return message


def _merged(wholes: dict[int, pb.GenerateResponse], message: pb.GenerateResponse) -> pb.GenerateResponse:
    whole = wholes.get(message.index)
    if whole is None:
        wholes[message.index] = message
        return message
    text = whole.text + message.text
    whole.MergeFrom(message)
    whole.text = text
    return whole


def _logprob(item: TokenLogprobs, tokenizer: Tokenizer) -> pb.Logprob:
    top = [
        pb.TopLogprob(token_id=token_id, token=tokenizer.token_text(token_id), logprob=logprob)
        for token_id, logprob in item.top
    ]
    token = tokenizer.token_text(item.token_id)
    return pb.Logprob(token_id=item.token_id, token=token, logprob=item.logprob, rank=item.rank, top=top)
