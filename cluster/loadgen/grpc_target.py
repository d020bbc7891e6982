"""Baton's own gRPC interface, `baton.v1.Inference`, as the target of a load."""

from __future__ import annotations

import time
from typing import Any

import grpc

from baton.cluster.loadgen.answer import Answer
from baton.cluster.loadgen.load_class import LoadClass
from baton.cluster.loadgen.target import Prompt, Sampling, ServerInfo
from baton.errors import UnavailableError
from baton.proto.baton.v1 import inference_pb2 as pb
from baton.proto.baton.v1 import inference_pb2_grpc as rpc

__all__ = ["GrpcTarget", "find_grpc_server"]

_FIND_TIMEOUT_S = 10.0
# Calls share few connections: one alone bounds what a busy server can be offered.
_NUM_CHANNELS = 4
_OPTIONS = (("grpc.max_receive_message_length", 16 << 20), ("grpc.use_local_subchannel_pool", 1))
_HTTP_STATUS = {
    grpc.StatusCode.INVALID_ARGUMENT: 400,
    grpc.StatusCode.UNAUTHENTICATED: 401,
    grpc.StatusCode.NOT_FOUND: 404,
    grpc.StatusCode.RESOURCE_EXHAUSTED: 429,
    grpc.StatusCode.CANCELLED: 499,
    grpc.StatusCode.UNAVAILABLE: 503,
    grpc.StatusCode.DEADLINE_EXCEEDED: 504,
}


def _metadata(api_key: str | None) -> tuple[tuple[str, str], ...]:
    return (("authorization", f"Bearer {api_key}"),) if api_key else ()


def find_grpc_server(address: str, *, api_key: str | None) -> ServerInfo:
    """Ask a router at host:port for its model.

    Raises:
        UnavailableError: it does not answer.
    """
    with grpc.insecure_channel(address) as channel:
        stub, metadata = rpc.InferenceStub(channel), _metadata(api_key)
        try:
            card = stub.GetModelInfo(pb.GetModelInfoRequest(), timeout=_FIND_TIMEOUT_S, metadata=metadata)
            server = stub.GetServerInfo(pb.GetServerInfoRequest(), timeout=_FIND_TIMEOUT_S, metadata=metadata)
        except grpc.RpcError as error:
            code = error.code().name if isinstance(error, grpc.Call) else type(error).__name__
            raise UnavailableError(f"{address} does not answer as baton.v1.Inference: {code}") from error
    return ServerInfo(
        kind="grpc",
        url=f"grpc://{address}",
        model=card.id,
        max_model_len=card.max_model_len,
        vocabulary=card.vocab_size,
        version=f"baton {server.version}",
    )


class GrpcTarget:
    """See `Target`. Tenants travel as metadata `x-baton-tenant`."""

    def __init__(self, info: ServerInfo, sampling: Sampling, *, api_key: str | None) -> None:
        self.info = info
        self._sampling = sampling
        self._metadata = _metadata(api_key)
        address = info.url.removeprefix("grpc://")
        self._channels = [grpc.aio.insecure_channel(address, options=_OPTIONS) for _ in range(_NUM_CHANNELS)]
        self._stubs = [rpc.InferenceStub(channel) for channel in self._channels]
        self._next = 0

    def prepare(
        self, prompt: Prompt, output_tokens: int, load_class: LoadClass
    ) -> tuple[pb.GenerateRequest, tuple[tuple[str, str], ...]]:
        """The message and the metadata."""
        options = pb.GenerationOptions(
            max_tokens=output_tokens,
            temperature=self._sampling.temperature,
            ignore_eos=self._sampling.ignore_eos,
            priority=load_class.priority or 0,
            cache_salt=load_class.cache_salt or "",
            priority_class=load_class.priority_class or "",
        )
        if self._sampling.send_slo and load_class.slo:
            bounds = {"ttft_ms": load_class.slo.ttft_ms, "tpot_ms": load_class.slo.tpot_ms}
            options.slo.CopyFrom(pb.Slo(**{key: value for key, value in bounds.items() if value is not None}))
        request = pb.GenerateRequest(options=options, stream=True)
        if prompt.as_text:
            request.text = " ".join(prompt.texts)
        else:
            for ids in prompt.ids:
                request.token_ids.ids.extend(ids.tolist())
        tenant = (("x-baton-tenant", load_class.tenant),) if load_class.tenant else ()
        return request, (*self._metadata, *tenant)

    async def send(self, prepared: Any, answer: Answer) -> None:
        """See `Target`."""
        request, metadata = prepared
        self._next = (self._next + 1) % len(self._stubs)
        call = self._stubs[self._next].Generate(request, metadata=metadata)
        try:
            async for message in call:
                now_s = time.monotonic()
                if message.token_ids or message.text:
                    answer.take_tokens(list(message.token_ids), message.text, now_s)
                if message.finish_reason:
                    answer.finish_reason = message.finish_reason
                    answer.end_s = now_s
                    answer.prompt_tokens = message.usage.prompt_tokens
                    answer.cached_tokens = message.usage.cached_tokens
                    answer.completion_tokens = message.usage.completion_tokens
            answer.http_status = 200
        except grpc.aio.AioRpcError as error:
            answer.http_status = _HTTP_STATUS.get(error.code(), 500)
            answer.error = f"{error.code().name}: {error.details()}"
            trailers: Any = error.trailing_metadata() or ()
            answer.retry_after_s = next((float(value) for name, value in trailers if name == "retry-after-s"), None)
        finally:
            call.cancel()

    async def close(self) -> None:
        """See `Target`."""
        for channel in self._channels:
            await channel.close(None)
