"""What workers tell a router besides tokens, and what it makes of it: restarts, gaps, silence, refusals, peers."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Iterable
from time import monotonic
from typing import Any

import pytest
from tests.router.fake_worker import FakeDecode, FakePrefill

import baton.router.worker_news as worker_news
from baton.config_routing import RoutingConfig
from baton.engine.block_journal import block_keys
from baton.engine.prefix_cache import block_hashes
from baton.engine.request import EngineRequest, SamplingParams
from baton.errors import UnavailableError
from baton.metrics import Metrics
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.block_feed import Freshness
from baton.router.costs.model import CostModel
from baton.router.dispatch import Dispatcher, LiveRequest
from baton.router.instances import InstanceTable
from baton.router.journal import Journal
from baton.router.request_ids import engine_id
from baton.router.routing.policies import make_policy
from baton.router.timelines import Timeline
from baton.state.base import SharedState
from baton.state.memory import MemoryState

_PROMPT = tuple(range(20, 220))
_KEYS = block_keys(block_hashes(_PROMPT, 16))


class _Costs(CostModel):
    """Remembers what it was told."""

    def __init__(self) -> None:
        super().__init__()
        self.samples: list[tuple[str, pb.StepSample]] = []

    def learn_steps(self, instance_id: str, incarnation: bytes, role: str, samples: Iterable[pb.StepSample]) -> None:
        self.samples += [(instance_id, sample) for sample in samples]


class _Router:
    """A dispatcher without its doors."""

    def __init__(self, name: str = "r", shared: SharedState | None = None) -> None:
        self.costs = _Costs()
        self.metrics = Metrics("router")
        self.table = InstanceTable()
        self.dispatcher = Dispatcher(
            self.table,
            self.metrics,
            router_id=name,
            policy=make_policy(RoutingConfig()),
            costs=self.costs,
            handover_timeout_s=5.0,
            silence_s=1.0,
            shared=shared,
        )
        self.index = self.dispatcher.news.index

    def show(self, *workers: FakeDecode | FakePrefill) -> None:
        self.table.apply([worker.status() for worker in workers])
        self.dispatcher.reconcile()

    def count(self, line: str) -> float:
        text = self.metrics.render().decode()
        return next((float(each.split()[-1]) for each in text.splitlines() if each.startswith(line)), 0.0)

    async def until(self, condition: Callable[[], bool]) -> None:
        async with asyncio.timeout(10):
            while not condition():
                await asyncio.sleep(0.01)

    async def until_synced(self, *names: str) -> None:
        await self.until(lambda: all(self.index.freshness(name) is Freshness.SYNCED for name in names))

    async def ask(self) -> None:
        sampling = SamplingParams(max_tokens=2)
        request = EngineRequest(request_id=engine_id("a", "0" * 8, 0), prompt_token_ids=_PROMPT, sampling=sampling)
        now_s = asyncio.get_running_loop().time()
        timeline = Timeline(request_id="a", unique_id="a", choice=0, arrived_unix_s=0.0, prompt_tokens=len(_PROMPT))
        journal = Journal(timeline, arrived_s=monotonic(), now_s=monotonic, root=None)
        live = LiveRequest(request=request, deadline_s=now_s + 10, journal=journal)
        async for _ in self.dispatcher.stream(live):
            pass


@contextlib.asynccontextmanager
async def _running(*servers: Any) -> AsyncIterator[None]:
    async with contextlib.AsyncExitStack() as stack:
        for server in servers:
            if isinstance(server, _Router):
                stack.push_async_callback(server.dispatcher.close)
            else:
                await server.start()
                stack.push_async_callback(server.stop)
        yield


async def test_a_gap_is_answered_by_a_snapshot() -> None:
    router, decode = _Router(), FakeDecode()
    async with _running(decode, router):
        router.show(decode)
        await router.until_synced("decode-0")
        decode.tell_blocks(*_KEYS[:3])
        await router.until(lambda: router.index.match(_KEYS, 0.0) == {"decode-0": 3})
        decode.tell_blocks(_KEYS[3], is_lost=True)
        decode.tell_blocks(_KEYS[4])
        await router.until(lambda: router.index.match(_KEYS, 0.0) == {"decode-0": 5})
        assert decode.snapshots == 2
        assert router.count('baton_block_event_gaps_total{instance="decode-0"') == 1


async def test_a_restarted_router_begins_with_a_snapshot_and_others_go_on() -> None:
    decode, first, second = FakeDecode(), _Router("1"), _Router("2")
    async with _running(decode, first):
        first.show(decode)
        await first.until_synced("decode-0")
        decode.tell_blocks(*_KEYS[:3])
        async with _running(second):
            second.show(decode)
            await second.until(lambda: second.index.match(_KEYS, 0.0) == {"decode-0": 3})
        decode.tell_blocks(_KEYS[3])
        await first.until(lambda: first.index.match(_KEYS, 0.0) == {"decode-0": 4})
        again = _Router("2 again")
        async with _running(again):
            again.show(decode)
            await again.until(lambda: again.index.match(_KEYS, 0.0) == {"decode-0": 4})


async def test_a_restarted_worker_has_an_empty_cache() -> None:
    router, decode, successor = _Router(), FakeDecode(), FakeDecode()
    async with _running(decode, successor, router):
        decode.tell_blocks(*_KEYS)
        router.show(decode)
        await router.until(lambda: router.index.match(_KEYS, 0.0) == {"decode-0": len(_KEYS)})
        await decode.stop()
        router.show(successor)
        await router.until_synced("decode-0")
        assert router.index.match(_KEYS, 0.0) == {}
        await router.until(lambda: not len(router.index))


async def test_a_worker_that_does_not_answer_a_gap_is_stale_and_said_to_be(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(worker_news, "_LOOK_EVERY_S", 0.05)
    router, decode = _Router(), FakeDecode()
    router.index._stale_after_s = 0.3
    async with _running(decode, router):
        router.show(decode)
        await router.until_synced("decode-0")
        decode.tell_blocks(*_KEYS[:3])
        decode._snapshot = pb.DecodeEvent  # type: ignore[assignment]
        decode.tell_blocks(_KEYS[3], is_lost=True)
        decode.tell_blocks(_KEYS[4])
        await router.until(lambda: router.index.freshness("decode-0") is Freshness.STALE)
        await router.until(lambda: router.count("baton_prefix_index_stale_instances") == 1)
        assert router.count("baton_prefix_index_blocks") == 3
        assert router.index.match(_KEYS, 0.0) == {}
        del decode._snapshot
        await router.until_synced("decode-0")  # it is asked again
        assert router.index.match(_KEYS, 0.0) == {"decode-0": 5}
        await router.until(lambda: router.count("baton_prefix_index_stale_instances") == 0)
    assert len([record for record in caplog.records if "is stale" in record.message]) == 1


async def test_steps_reach_whoever_learns_from_them_and_load_is_live() -> None:
    router, decode, prefill = _Router(), FakeDecode(), FakePrefill()
    async with _running(decode, prefill, router):
        router.show(decode, prefill)
        await router.until_synced("decode-0", "prefill-0")
        decode.tell_steps(pb.StepSample(decode_rows=3, step_s=0.5))
        await router.until(lambda: bool(router.costs.samples))
        assert router.costs.samples == [("decode-0", pb.StepSample(decode_rows=3, step_s=0.5))]
        prefill.load = pb.WorkerLoad(pending_prefill_tokens=77)
        there = router.table.get("prefill-0")
        assert there is not None
        await router.until(lambda: there.view().pending_prefill_tokens == 77)
        prefill.load = pb.WorkerLoad(pending_prefill_tokens=5)
        await prefill.stop()
        await router.until(lambda: not there.is_followed)


async def test_one_choice_is_counted_in_by_the_others_and_runs_out() -> None:
    shared, decode = MemoryState(), FakeDecode()
    one, other = _Router("one", shared), _Router("other", shared)
    async with _running(decode, one, other):
        for router in (one, other):
            router.show(decode)
            await router.until_synced("decode-0")
        there = other.table.get("decode-0")
        assert there is not None
        await one.ask()
        await other.until(lambda: there.others.requests == 1)
        assert there.view().own_prefill_tokens == len(_PROMPT)
        assert other.index.match(_KEYS, asyncio.get_running_loop().time()) == {"decode-0": len(_KEYS)}
        await other.until(lambda: there.others.requests == 0)
        assert there.view().own_prefill_tokens == 0
        own = one.table.get("decode-0")
        assert own is not None
        assert own.others.requests == 0
        assert one.count('baton_peer_choices_total{outcome="told"') == 1
        assert other.count('baton_peer_choices_total{outcome="heard"') == 1


async def test_words_from_the_shared_state_are_not_trusted() -> None:
    shared, decode = MemoryState(), FakeDecode()
    router = _Router("r", shared)
    async with _running(decode, router):
        router.show(decode)
        await router.until_synced("decode-0")
        sound = pb.PendingChoice(instance_id="decode-0", incarnation=decode.incarnation, block_keys=_KEYS, ttl_s=1)
        for change in (
            {"block_keys": range(100_000)},
            {"prefill_tokens": 2**32 - 1},
            {"ttl_s": 1e9},
            {"ttl_s": float("nan")},
        ):
            choice = pb.PendingChoice(instance_id="decode-0", incarnation=decode.incarnation, ttl_s=1)
            choice.MergeFrom(pb.PendingChoice(**change))
            await _append(shared, pb.PendingChoices(router_id="x", choices=[choice]).SerializeToString())
        await _append(shared, b"\xff\xff")
        stranger = pb.PendingChoice(instance_id="decode-9", incarnation=decode.incarnation, block_keys=_KEYS, ttl_s=1)
        await _append(shared, pb.PendingChoices(router_id="x", choices=[stranger, sound]).SerializeToString())
        there = router.table.get("decode-0")
        assert there is not None
        await router.until(lambda: there.others.requests == 1)
        assert router.count('baton_peer_choices_total{outcome="refused"') == 5
        assert router.index.match(_KEYS, asyncio.get_running_loop().time()) == {"decode-0": len(_KEYS)}


async def _append(shared: SharedState, event: bytes) -> None:
    await shared.append("choices", event, max_events=100, ttl_s=60)


class _Away(MemoryState):
    async def append(self, stream: str, event: bytes, *, max_events: int, ttl_s: float) -> None:
        raise UnavailableError("away")

    async def end(self, stream: str) -> str:
        raise UnavailableError("away")


async def test_without_the_shared_state_a_router_goes_on_and_counts() -> None:
    decode, router = FakeDecode(), _Router("r", _Away())
    async with _running(decode, router):
        router.show(decode)
        await router.until_synced("decode-0")
        await router.ask()
        await router.until(lambda: router.count('baton_peer_choices_total{outcome="dropped"') == 1)
