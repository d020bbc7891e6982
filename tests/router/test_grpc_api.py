"""`baton.v1.Inference` as a generated client sees it, with health, reflection, deadlines and keys."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc
from tests.router.fake_worker import expected
from tests.router.harness import MAX_MODEL_LEN, VOCAB_SIZE, Harness, running_router

from baton.proto.baton.v1 import inference_pb2 as pb

SERVICE = "baton.v1.Inference"


async def _collect(call: Any) -> list[pb.GenerateResponse]:
    return [message async for message in call]


async def test_generate_streams_text_tokens_and_usage(router: Harness) -> None:
    options = pb.GenerationOptions(max_tokens=6, logprobs=2)
    messages = await _collect(router.grpc.Generate(pb.GenerateRequest(text="Hello", options=options, stream=True)))
    prompt = router.tokenizer.encode("Hello")
    ids = [token for message in messages for token in message.token_ids]
    assert ids == expected(prompt, 6)
    assert "".join(message.text for message in messages) == router.text(ids)
    assert [message.finish_reason for message in messages] == [""] * (len(messages) - 1) + ["length"]
    last = messages[-1]
    assert (last.usage.prompt_tokens, last.usage.completion_tokens) == (len(prompt), 6)
    assert (last.prefill_instance, last.decode_instance) == ("decode-0", "decode-0")
    assert all(len(entry.top) == 2 for message in messages for entry in message.logprobs)


async def test_generate_without_streaming_gives_one_message_per_choice(router: Harness) -> None:
    options = pb.GenerationOptions(max_tokens=5, n=3, stop=["never"], prompt_logprobs=0)
    ids = pb.TokenIds(ids=[20, 21, 22])
    messages = await _collect(router.grpc.Generate(pb.GenerateRequest(token_ids=ids, options=options)))
    assert sorted(message.index for message in messages) == [0, 1, 2]
    for message in messages:
        assert list(message.token_ids) == expected([20, 21, 22], 5)
        assert message.text == router.text(expected([20, 21, 22], 5))
        assert message.finish_reason == "length"
        assert len(message.prompt_logprobs) == 2


async def test_messages_and_defaults(router: Harness) -> None:
    chat = pb.ChatMessages(messages=[pb.ChatMessage(role="user", content="Hello")])
    router.decode.eos_after = 3
    await _collect(router.grpc.Generate(pb.GenerateRequest(messages=chat)))
    await _collect(router.grpc.Generate(pb.GenerateRequest(text="Hello")))
    first, second = (submit.request for submit in router.decode.submits)
    assert list(first.prompt_token_ids) == router.tokenizer.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert first.sampling.max_tokens == MAX_MODEL_LEN - len(first.prompt_token_ids)
    assert (second.sampling.max_tokens, second.sampling.temperature) == (16, 1)


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({}, "", "prompt"),
    ({"text": ""}, "", "text"),
    ({"token_ids": pb.TokenIds(ids=[VOCAB_SIZE])}, str(VOCAB_SIZE - 1), "token_ids"),
    ({"token_ids": pb.TokenIds(ids=[])}, "", "token_ids"),
    ({"messages": pb.ChatMessages()}, "", "messages"),
    ({"messages": pb.ChatMessages(messages=[pb.ChatMessage(role="x")])}, "", "messages[0].role"),
    ({"text": "x", "options": pb.GenerationOptions(max_tokens=0)}, "1", "max_tokens"),
    ({"text": "x", "options": pb.GenerationOptions(max_tokens=2**31)}, str(MAX_MODEL_LEN), "max_tokens"),
    ({"text": "x", "options": pb.GenerationOptions(temperature=float("nan"))}, "", "temperature"),
    ({"text": "x", "options": pb.GenerationOptions(top_p=float("inf"))}, "", "top_p"),
    ({"text": "x", "options": pb.GenerationOptions(n=10**9)}, "128", "n"),
    ({"text": "x", "options": pb.GenerationOptions(logprobs=10**6)}, "20", "logprobs"),
    ({"text": "x", "options": pb.GenerationOptions(stop=[""])}, "", "stop[0]"),
    ({"text": "x", "options": pb.GenerationOptions(logit_bias={VOCAB_SIZE: 1})}, "", "logit_bias"),
    ({"text": "x", "request_id": "a b"}, "", "request_id"),
]


async def test_bad_input_is_invalid_argument_with_the_field_named(router: Harness) -> None:
    for fields, told, param in BAD:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(router.grpc.Generate(pb.GenerateRequest(**fields)))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT, fields
        details = caught.value.details() or ""
        assert param.split("[")[0] in details
        assert told in details
        assert dict(caught.value.trailing_metadata() or ())["error-param"] == param
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _collect(router.grpc.Generate(pb.GenerateRequest(text="x", model="other")))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert router.decode.submits == []
    assert await _collect(router.grpc.Generate(pb.GenerateRequest(text="x", model="tiny")))


async def test_tokenize_detokenize_and_info(router: Harness) -> None:
    tokens = await router.grpc.Tokenize(pb.TokenizeRequest(text="Hello <|im_end|>"))
    assert list(tokens.token_ids) == router.tokenizer.encode("Hello <|im_end|>")
    assert tokens.max_model_len == MAX_MODEL_LEN
    text = await router.grpc.Detokenize(pb.DetokenizeRequest(token_ids=tokens.token_ids))
    assert text.text == "Hello <|im_end|>"
    model = await router.grpc.GetModelInfo(pb.GetModelInfoRequest())
    assert (model.id, model.vocab_size, list(model.eos_token_ids), model.dtype) == ("tiny", VOCAB_SIZE, [2], "float32")
    server = await router.grpc.GetServerInfo(pb.GetServerInfoRequest())
    assert [(instance.id, instance.role, instance.state) for instance in server.instances] == [
        ("decode-0", "decode", "ready"),
        ("prefill-0", "prefill", "ready"),
    ]


async def test_deadline_cancel_and_abort_stop_the_work(router: Harness) -> None:
    router.decode.pause_after = 2
    options = pb.GenerationOptions(max_tokens=50)
    request = pb.GenerateRequest(text="x", options=options, stream=True)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _collect(router.grpc.Generate(request, timeout=3.0))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await router.decode.until(lambda: len(router.decode.cancelled) == 1)

    router.decode.gate.set()
    call = router.grpc.Generate(pb.GenerateRequest(text="x", options=options, stream=True))
    await call.read()
    call.cancel()
    await router.decode.until(lambda: len(router.decode.cancelled) == 2)

    router.decode.gate.set()
    call = router.grpc.Generate(pb.GenerateRequest(text="x", options=options, stream=True, request_id="mine"))
    answers = aiter(call)
    await anext(answers)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _collect(router.grpc.Generate(pb.GenerateRequest(text="x", request_id="mine")))
    assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
    await router.grpc.Abort(pb.AbortRequest(request_id="mine"))
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _collect(answers)
    assert caught.value.code() is grpc.StatusCode.CANCELLED
    await router.decode.until(lambda: len(router.decode.cancelled) == 3)
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await router.grpc.Abort(pb.AbortRequest(request_id="mine"))
    assert caught.value.code() is grpc.StatusCode.NOT_FOUND
    assert not router.decode.active


async def test_a_deadline_before_the_first_token(router: Harness) -> None:
    router.decode.gate.clear()
    with pytest.raises(grpc.aio.AioRpcError) as caught:
        await _collect(router.grpc.Generate(pb.GenerateRequest(text="x"), timeout=3.0))
    assert caught.value.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    await router.decode.until(lambda: len(router.decode.cancelled) == 1)


async def test_health_follows_readiness(tmp_path: Path) -> None:
    async with running_router(tmp_path, with_workers=False) as router:
        assert router.channel is not None
        stub = health_pb2_grpc.HealthStub(router.channel)
        kind = health_pb2.HealthCheckResponse
        assert (await stub.Check(health_pb2.HealthCheckRequest())).status == kind.SERVING
        assert (await stub.Check(health_pb2.HealthCheckRequest(service=SERVICE))).status == kind.NOT_SERVING
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await stub.Check(health_pb2.HealthCheckRequest(service="other"))
        assert caught.value.code() is grpc.StatusCode.NOT_FOUND
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(router.grpc.Generate(pb.GenerateRequest(text="x")))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE

        watch = stub.Watch(health_pb2.HealthCheckRequest(service=SERVICE))
        assert (await watch.read()).status == kind.NOT_SERVING
        await router.registry.publish(router.decode)
        assert (await asyncio.wait_for(watch.read(), 10)).status == kind.SERVING
        assert await _collect(router.grpc.Generate(pb.GenerateRequest(text="x")))
        await router.registry.publish()
        await router.decode.stop()
        assert (await asyncio.wait_for(watch.read(), 10)).status == kind.NOT_SERVING
        watch.cancel()


async def test_reflection_names_the_services(router: Harness) -> None:
    assert router.channel is not None

    async def ask() -> AsyncIterator[reflection_pb2.ServerReflectionRequest]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        yield reflection_pb2.ServerReflectionRequest(file_containing_symbol=SERVICE)

    stub = reflection_pb2_grpc.ServerReflectionStub(router.channel)
    answers = [answer async for answer in stub.ServerReflectionInfo(ask())]
    names = {service.name for service in answers[0].list_services_response.service}
    assert {SERVICE, "grpc.health.v1.Health"} <= names
    assert answers[1].file_descriptor_response.file_descriptor_proto


async def test_api_key(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"api_key": "secret-key"}) as router:
        assert router.channel is not None
        check = health_pb2_grpc.HealthStub(router.channel).Check
        assert (await check(health_pb2.HealthCheckRequest(service=SERVICE))).status == 1
        for metadata in ((), (("authorization", "Bearer wrong"),)):
            for call in (
                _collect(router.grpc.Generate(pb.GenerateRequest(text="x"), metadata=metadata)),
                router.grpc.Tokenize(pb.TokenizeRequest(text="x"), metadata=metadata),
            ):
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await call
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
        key = (("authorization", "Bearer secret-key"),)
        assert await _collect(router.grpc.Generate(pb.GenerateRequest(text="x"), metadata=key))


async def test_overload_carries_a_hint(tmp_path: Path) -> None:
    async with running_router(tmp_path, router={"max_queued_requests": 1}) as router:
        router.decode.gate.clear()
        running = asyncio.create_task(_collect(router.grpc.Generate(pb.GenerateRequest(text="x"))))
        await router.decode.until(lambda: len(router.decode.submits) == 1)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await _collect(router.grpc.Generate(pb.GenerateRequest(text="x")))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert int(dict(caught.value.trailing_metadata() or ())["retry-after-s"]) >= 1
        router.decode.gate.set()
        assert await running
