"""What real workers tell routers besides tokens: blocks, load and steps, to early, late and slow listeners."""

from __future__ import annotations

import asyncio
from typing import Any

import grpc
import pytest
from tests.worker.harness import TIMEOUT_S, Router, Workers, request, workers

from baton.engine.block_journal import BlockChange, block_keys
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.worker.block_log import BlockLog
from baton.worker.news import Listener, News

LONG = [(7 * i) % 500 for i in range(100)]


class _Told:
    """Applies what a stream says of blocks."""

    def __init__(self) -> None:
        self.held: set[int] = set()
        self.seq = -1
        self.snapshots = 0
        self.steps: list[pb.StepSample] = []
        self.ended = 0

    def take(self, message: pb.DecodeEvent | pb.WorkerNews) -> None:
        self.steps += message.steps
        if isinstance(message, pb.DecodeEvent):
            self.ended += sum(bool(output.finish_reason) for output in message.step.outputs)
        for events in message.blocks:
            if events.snapshot:
                self.snapshots += 1
                assert not events.more, "small enough for one part"
                self.held = set()
            else:
                assert events.seq == self.seq + 1
            self.seq = events.seq
            BlockChange(list(events.stored), list(events.removed), events.cleared).apply(self.held)


async def _until_equal(both: Workers, role: str, told: _Told, read: Any) -> None:
    """Reads until it says what the pool holds."""
    async with asyncio.timeout(TIMEOUT_S):
        while told.held != set(block_keys(both.engines[role].pool.names())):
            told.take(await read())


async def _ask(router: Router, name: str, start: int) -> None:
    prompt = [(start + i) % 500 for i in range(100)]
    await router.submit(request(name, prompt, 40), remote=True)
    await router.start_prefill(request(name, prompt, 40))


async def test_a_decode_stream_tells_of_blocks_and_answers_with_snapshots(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, {}, num_blocks=40) as both:
        router, told = await both.router(), _Told()
        for number in range(12):  # more than the pool holds: some are evicted
            await _ask(router, f"r{number}", 7 * number)
        while told.ended < 12:
            told.take(await asyncio.wait_for(router.call.read(), TIMEOUT_S))
        await _until_equal(both, "decode", told, router.call.read)
        assert told.snapshots == 1
        assert len(told.held) > 20
        late, told_late = await both.router(), _Told()
        await _until_equal(both, "decode", told_late, late.call.read)
        assert (told_late.snapshots, told_late.held) == (1, told.held)
        await late.call.write(pb.DecodeCommand(send_snapshot=pb.SendSnapshot()))
        while told_late.snapshots < 2:
            told_late.take(await asyncio.wait_for(late.call.read(), TIMEOUT_S))
        assert (told_late.held, told_late.seq) == (told.held, told.seq)
        await router.close()
        await late.close()


async def test_followers_of_a_prefill_worker_hear_of_load_and_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, {"router.silence_s": 1.0}) as both:
        router, told = await both.router(), _Told()
        status = both.registry.statuses["prefill-0"]
        async with grpc.aio.insecure_channel(status.address) as channel:
            call: Any = rpc.WorkerStub(channel).Follow(pb.FollowRequest(router_id="test"))
            first = await asyncio.wait_for(call.read(), TIMEOUT_S)
            assert first.incarnation == status.incarnation
            assert first.load.kv_blocks_free == first.load.kv_blocks_total > 0
            assert first.load.max_running_requests > 0
            told.take(first)
            assert told.snapshots == 1
            await _ask(router, "a", 3)
            await _until_equal(both, "prefill", told, call.read)
            assert told.snapshots == 1
            assert told.held
            beat = await asyncio.wait_for(call.read(), TIMEOUT_S)
            while beat.load.kv_blocks_owned:
                beat = await asyncio.wait_for(call.read(), TIMEOUT_S)
            assert not beat.incarnation
        assert status.host_id == both.registry.statuses["decode-0"].host_id != ""
        await router.close()


async def test_a_follower_ends_with_its_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        channel = grpc.aio.insecure_channel(both.registry.statuses["prefill-0"].address)
        call: Any = rpc.WorkerStub(channel).Follow(pb.FollowRequest(router_id="test"))
        assert await asyncio.wait_for(call.read(), TIMEOUT_S) is not grpc.aio.EOF
        await rpc.WorkerStub(channel).Shutdown(pb.ShutdownRequest())
        async with asyncio.timeout(TIMEOUT_S):
            while await call.read() is not grpc.aio.EOF:
                pass
        await channel.close(None)


async def test_the_load_tells_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch) as both:
        router = await both.router()
        await router.submit(request("a", LONG, 100), remote=True)
        async with asyncio.timeout(TIMEOUT_S):
            while not (load := (await router.loads())[0]).context_tokens:
                await router.read_step()
        assert load.context_tokens == len(LONG), "its pages are awaited"
        assert load.max_remaining_tokens == 100
        await router.cancel("a")
        await router.collect("a")
        await router.wait_until_settled()
        assert not (await router.loads())[0].max_remaining_tokens
        await router.close()


async def test_who_does_not_listen_costs_nothing_and_catches_up_by_a_snapshot() -> None:
    load = pb.WorkerLoad(running_requests=3)
    news, calls = News(lambda: load), list[str]()
    news.log = BlockLog(max_batch_keys=8, max_kept_keys=100)
    slow = news.listen(lambda: calls.append("slow"), wants_load=False)
    quick = news.listen(lambda: calls.append("quick"), wants_load=True)
    told = {slow: _Told(), quick: _Told()}

    def read(listener: Listener) -> None:
        message = pb.WorkerNews()
        listener.put_into(message)
        assert message.load == load
        told[listener].take(message)

    for number in range(500):
        news.add_steps([pb.StepSample(decode_rows=number)])
        news._tell(BlockChange([number], [number - 5] if number >= 5 else []))
        read(quick)
    assert calls.count("slow") == 1, "it is called again only when it has read"
    read(slow)
    assert told[slow].held == told[quick].held == {495, 496, 497, 498, 499}
    assert (told[slow].snapshots, told[quick].snapshots) == (1, 1)
    assert len(told[quick].steps) == 500
    assert [step.decode_rows for step in told[slow].steps] == list(range(500 - 256, 500))
    calls.clear()
    news._tell(BlockChange([], []))
    assert calls == ["quick"], "the load alone is news for some"
    slow.close()
    quick.close()
    news._tell(BlockChange([1000], []))
    assert calls == ["quick"]


async def test_a_follower_that_does_not_read_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    async with workers(monkeypatch, {"router.silence_s": 0.01}, num_blocks=64) as both:
        channel = grpc.aio.insecure_channel(both.registry.statuses["prefill-0"].address)
        call: Any = rpc.WorkerStub(channel).Follow(pb.FollowRequest(router_id="test"))
        told = _Told()
        told.take(await asyncio.wait_for(call.read(), TIMEOUT_S))
        router = await both.router()
        for number in range(20):
            await _ask(router, f"r{number}", 11 * number)
        # Whatever was not read meanwhile is in order, or begun anew.
        await _until_equal(both, "prefill", told, call.read)
        await router.close()
        await channel.close(None)
