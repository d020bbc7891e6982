"""Both workers together: pages travel, failures fall back, and every block comes back."""

from __future__ import annotations

import asyncio
import dataclasses

import grpc
import pytest
from harness import TIMEOUT_S, Router, expected, request, workers

from baton.engine.fake import LatencyModel
from baton.engine.request import FinishReason
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.codec import request_to_proto
from baton.worker.runtime import PROTOCOL_VERSION

LONG = list(range(1, 301))
SHORT = [5, 6, 7]


@pytest.mark.parametrize("transport", ["shm", "gloo"])
@pytest.mark.parametrize("one_message_below_tokens", [0, 100_000])
async def test_handover_gives_the_same_tokens(
    transport: str, one_message_below_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"transfer.transport": transport, "transfer.one_message_below_tokens": one_message_below_tokens}
    async with workers(
        monkeypatch,
        settings,
        max_batch_tokens=64,
        decode_fake={"block_size": 8},
        prefill_fake={"block_size": 32},
        layers_per_group=3,
    ) as both:
        router = await both.router()
        prompts = {f"r{i}": [(7 * i + j) % 500 for j in range(1 + 37 * i)] for i in range(9)}
        calls = []
        for name, prompt in prompts.items():
            await router.submit(request(name, prompt, logprobs=2), remote=True)
            calls.append(router.start_prefill(request(name, prompt, logprobs=2)))
        tokens = await router.collect(*prompts)
        assert tokens == [expected(prompt, 6) for prompt in prompts.values()]
        for call, prompt in zip(calls, prompts.values(), strict=True):
            reply = await call
            assert reply.shipped_tokens == len(prompt)
            assert reply.shipped_bytes == len(prompt) * 4 * 2 * 2 * 4  # layers, K and V, head_dim, fp32
        assert set(router.prefill_instances.values()) == {"prefill-0"}
        assert all(len(output.logprobs) == 1 for outputs in router.outputs.values() for output in outputs)
        # Again: both sides hold the prefix now, and only what the decode worker misses travels.
        await router.submit(request("again", prompts["r8"]), remote=True)
        reply = await router.start_prefill(request("again", prompts["r8"]))
        assert await router.collect("again") == [expected(prompts["r8"], 6)]
        assert reply.shipped_tokens == 1 + len(prompts["r8"]) - 1 - (len(prompts["r8"]) - 1) // 8 * 8
        assert router.outputs["again"][0].cached_tokens > 0
        await router.wait_until_settled()
        await router.close()


async def test_a_resumed_request_is_handed_over_too(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, {}, decode_fake={"block_size": 8}, prefill_fake={"block_size": 32}) as both:
        router = await both.router()
        prompt = [(3 * i) % 500 for i in range(50)]
        whole = expected(prompt, 12)
        resumed = dataclasses.replace(request("r", prompt, 12), resumed_token_ids=tuple(whole[:7]), attempt=1)
        await router.submit(resumed, remote=True)
        reply = await router.start_prefill(resumed)
        assert await router.collect("r") == [whole[7:]]
        assert reply.shipped_tokens == 57
        assert router.prefill_instances["r"] == "prefill-0"
        await router.wait_until_settled()
        await router.close()


async def test_a_quiet_worker_beats(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, {"router.silence_s": 0.2}) as both:
        router = await both.router()
        snapshot = (await asyncio.wait_for(router.call.read(), TIMEOUT_S)).blocks
        assert [(part.snapshot, part.more, len(part.stored)) for part in snapshot] == [(True, False, 0)]
        for _ in range(3):
            event = await asyncio.wait_for(router.call.read(), TIMEOUT_S)
            assert event.beat.incarnation == router.decode.incarnation
        await router.close()


async def test_no_pages_in_time_means_prefill_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        await router.submit(request("a", LONG), remote=True, handover_timeout_s=0.2)
        assert await router.collect("a") == [expected(LONG, 6)]
        # A late prefill worker is told that nobody waits any more.
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.start_prefill(request("a", LONG))
        assert "no pages came within 0.2 s" in (caught.value.details() or "")
        await router.wait_until_settled()
        await router.close()


async def test_a_failed_prefill_means_prefill_here(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        await router.submit(request("a", LONG), remote=True)
        await router.prefill_failed("a")
        assert await router.collect("a") == [expected(LONG, 6)]
        await router.wait_until_settled()
        await router.close()


async def test_another_incarnation_is_a_stranger(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        await router.submit(request("a", LONG), remote=True)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.start_prefill(request("a", LONG), decode_incarnation=b"x" * 16)
        assert "not the process" in (caught.value.details() or "")
        await router.prefill_failed("a")
        assert await router.collect("a") == [expected(LONG, 6)]
        await router.wait_until_settled()
        await router.close()


async def test_a_prefill_call_that_is_cancelled_gives_its_blocks_back(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"latency": LatencyModel(base_s=0.05), "max_batch_tokens": 16}
    async with workers(monkeypatch, prefill_fake=slow) as both:
        router = await both.router()
        # With this one the link comes up: over one that does not stand yet nobody is told anything.
        await router.submit(request("first", SHORT), remote=True)
        await router.start_prefill(request("first", SHORT))
        await router.collect("first")
        await router.submit(request("a", LONG), remote=True)
        call = router.start_prefill(request("a", LONG))
        while not (await router.loads())[1].running_requests:
            await asyncio.sleep(0.01)
        call.cancel()
        # The abort reaches the decode worker over the link, without a word from the router.
        assert await router.collect("a") == [expected(LONG, 6)]
        await router.wait_until_settled()
        await router.close()


@pytest.mark.parametrize("phase", ["reserved", "shipping", "running", "waiting"])
async def test_cancel_in_every_phase(phase: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # To be cut short in the midst of shipping it must last for longer than this loop may be held up.
    slow = {"latency": LatencyModel(base_s=0.1 if phase == "shipping" else 0.02)}
    slow |= {"max_batch_tokens": 16, "max_batch_size": 1}
    async with workers(monkeypatch, decode_fake=slow, prefill_fake=slow) as both:
        router = await both.router()
        call = None
        if phase == "waiting":
            await router.submit(request("first", LONG, 100))
        await router.submit(request("a", LONG, 100), remote=phase in ("reserved", "shipping"))
        if phase == "shipping":
            call = router.start_prefill(request("a", LONG, 100))
            while not (await router.loads())[1].running_requests:
                await asyncio.sleep(0.01)
        if phase == "running":
            await router.read_step()
        if phase == "reserved":
            while not (await router.loads())[0].kv_blocks_owned:
                await asyncio.sleep(0.01)
        await router.cancel("a")
        await router.collect("a")
        assert router.last("a").finish_reason is FinishReason.ABORT
        if phase == "waiting":
            await router.cancel("first")
            await router.collect("first")
        if call is not None:
            with pytest.raises(grpc.aio.AioRpcError):
                await call
        await router.wait_until_settled()
        await router.close()


async def test_a_broken_stream_ends_its_requests_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, latency=LatencyModel(base_s=0.005)) as both:
        leaving, staying = await both.router(), await both.router()
        for index in range(5):
            await leaving.submit(request(f"l{index}", LONG, 200), remote=index % 2 == 0)
        await staying.submit(request("s", SHORT, 60))
        await leaving.read_step()
        await leaving.close()
        assert await staying.collect("s") == [expected(SHORT, 60)]
        await staying.wait_until_settled()
        await staying.close()


async def test_bad_commands_are_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, max_model_len=64, latency=LatencyModel(base_s=0.02)) as both:
        router = await both.router()
        await router.submit(request("long", LONG))
        await router.collect("long")
        assert "max_model_len 64" in router.last("long").error
        await router.submit(request("twice", SHORT, 50))
        await router.submit(request("twice", SHORT, 50))
        await router.collect("twice")
        assert any("already running" in output.error for output in router.outputs["twice"])
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.start_prefill(request("long", LONG))
        assert caught.value.code() is grpc.StatusCode.INVALID_ARGUMENT
        await router.wait_until_settled()
        await router.close()


async def test_another_protocol_version_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        other = type(router)(router.decode, router.prefill)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await other.hello(version=99)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        assert "protocol 99" in (caught.value.details() or "")
        await other.close()
        await router.close()


async def test_a_failing_engine_ends_its_worker_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()

        def forward(*_: object) -> None:
            raise RuntimeError("a page is missing")

        monkeypatch.setattr(both.engines["decode"].runner, "forward", forward)
        await router.submit(request("a", SHORT))
        with pytest.raises(RuntimeError, match="a page is missing"):
            await asyncio.wait_for(asyncio.shield(both.tasks["decode-0"]), TIMEOUT_S)
        assert both.registry.statuses["decode-0"].state == "dead"
        both.engines["decode"].release(("a", 0))
        await router.close()


async def test_preemption_under_handovers_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    small = {"num_blocks": 24, "block_size": 8, "max_model_len": 160, "max_batch_size": 8}
    async with workers(monkeypatch, decode_fake=small, prefill_fake={"num_blocks": 16, "max_model_len": 160}) as both:
        router = await both.router()
        prompts = {f"r{i}": [(3 * i + j) % 500 for j in range(1 + (i * 17) % 60)] for i in range(40)}
        calls = []
        for index, (name, prompt) in enumerate(prompts.items()):
            await router.submit(request(name, prompt, 30), remote=index % 2 == 0)
            if index % 2 == 0:
                calls.append(asyncio.ensure_future(router.start_prefill(request(name, prompt, 30))))
        assert await router.collect(*prompts) == [expected(prompt, 30) for prompt in prompts.values()]
        await asyncio.gather(*calls)
        assert both.engines["decode"].scheduler.num_preemptions > 0
        await router.wait_until_settled()
        await router.close()


async def test_a_missing_command_breaks_the_stream_and_a_repeated_one_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async with workers(monkeypatch, latency=LatencyModel(base_s=0.005)) as both:
        statuses = both.registry.statuses
        router = Router(statuses["decode-0"], statuses["prefill-0"])
        hello = pb.Hello(router_id="test", protocol_version=PROTOCOL_VERSION)
        submit = pb.Submit(request=request_to_proto(request("a", SHORT)))
        long = pb.Submit(request=request_to_proto(request("b", LONG, 200)))
        await router.call.write(pb.DecodeCommand(hello=hello, seq=1))
        for seq in (2, 2, 1):
            await router.call.write(pb.DecodeCommand(submit=submit, seq=seq))
        await router.collect("a")
        assert router.events[0] == 1
        assert router.events == list(range(1, len(router.events) + 1))
        await router.call.write(pb.DecodeCommand(submit=long, seq=3))
        await router.call.write(pb.DecodeCommand(cancel=pb.Cancel(request_id="a"), seq=5))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await router.collect("b")
        assert caught.value.code() is grpc.StatusCode.DATA_LOSS
        assert "message 5 came after 3" in (caught.value.details() or "")
        await router.wait_until_settled()
        await router.close()
