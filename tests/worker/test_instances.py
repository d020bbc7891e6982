"""Instances of several ranks: any pair of layouts hands over, tokens stay, blocks settle, a lost rank ends its own."""

from __future__ import annotations

import asyncio
import dataclasses
import random
import time
from pathlib import Path
from typing import Any

import grpc
import pytest
from harness import request
from rank_harness import ranks
from tests.engine.model_factory import VOCAB_SIZE

from baton.engine.engine import Engine
from baton.engine.request import EngineRequest
from baton.engine.runner import ModelRunner
from baton.errors import UnavailableError
from baton.placement import Placement
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.worker.driver_link import DriverLink

pytestmark = pytest.mark.usefixtures("ranks_in_threads")

_NUM_TOKENS = 12


def requests(count: int = 6) -> list[EngineRequest]:
    rng = random.Random(5)
    prompts = [
        [rng.randrange(VOCAB_SIZE - 70) for _ in range(rng.choice([1, 7, 16, 33, 64, 150]))] for _ in range(count)
    ]
    return [request(f"r{index}", prompt, _NUM_TOKENS, ignore_eos=True) for index, prompt in enumerate(prompts)]


def alone(model: Path) -> list[list[int]]:
    """The single rank's tokens."""
    runner = ModelRunner(model, num_blocks=96, max_model_len=256, max_batch_tokens=256)
    engine = Engine(runner, max_batch_tokens=256, max_batch_size=16)
    tokens: dict[str, list[int]] = {}
    for each in requests():
        assert not engine.add(each)
    while engine.has_work:
        for output in engine.step().outputs:
            tokens.setdefault(output.request_id, []).extend(output.token_ids)
    return [tokens[each.request_id] for each in requests()]


@pytest.mark.parametrize(
    ("prefill", "decode", "settings"),
    [
        ((2, 1), (1, 1), {}),
        ((1, 1), (1, 2), {"prefill.block_size": 8}),
        ((1, 2), (2, 1), {"decode.block_size": 32, "transfer.transport": "gloo"}),
        ((2, 2), (2, 2), {}),
        ((1, 1), (4, 1), {"transfer.one_message_below_tokens": 0, "transfer.layers_per_group": 1}),
    ],
)
async def test_any_layout_hands_over_to_any(
    model: Path, prefill: tuple[int, int], decode: tuple[int, int], settings: dict[str, Any]
) -> None:
    layout = {
        "prefill.tensor_parallel": prefill[0],
        "prefill.pipeline_parallel": prefill[1],
        "decode.tensor_parallel": decode[0],
        "decode.pipeline_parallel": decode[1],
        "prefill.max_batch_tokens": 64,
    }
    async with ranks(model, {**layout, **settings}) as started:
        status = started.registry.statuses["decode-0"]
        assert [rank.rank for rank in status.ranks] == list(range(decode[0] * decode[1]))
        router = await started.router()
        sent = requests()
        calls = []
        for each in sent:
            await router.submit(each, remote=True)
            calls.append(asyncio.ensure_future(_reply(router.start_prefill(each))))
        tokens = await router.collect(*(each.request_id for each in sent))
        replies = await asyncio.gather(*calls)
        assert tokens == alone(model)
        assert set(router.prefill_instances.values()) == {"prefill-0"}
        assert all(reply.shipped_bytes > 0 for reply in replies)
        await router.wait_until_settled()
        await router.close()


async def _reply(call: Any) -> Any:
    return await call


TWO = {"decode.tensor_parallel": 2, "prefill.pipeline_parallel": 2, "prefill.max_batch_tokens": 64}


async def test_links_are_there_before_the_first_request(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "baton.kv_transfer.receiver")
    async with ranks(model, TWO, in_turn=True):
        links = [record.message for record in caplog.records if "is up over" in record.message]
        # Both stages of the prefill instance to both tensor ranks of the decode instance.
        assert len(links) == 4, links


async def test_cancelled_and_refused_requests_leave_nothing_behind(
    model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = ModelRunner.forward

    def slow(*arguments: Any, **options: Any) -> Any:
        # Three of these are to last until the request is cancelled.
        time.sleep(0.2)
        return forward(*arguments, **options)

    monkeypatch.setattr(ModelRunner, "forward", slow)
    async with ranks(model, TWO) as started:
        router = await started.router()
        long, stays, stranger = requests()[3], request("stays", [9] * 40, 5, ignore_eos=True), request("x", [3] * 50)
        await router.submit(long, remote=True)
        call = router.start_prefill(long)
        await router.submit(stays, remote=True)
        staying = asyncio.ensure_future(_reply(router.start_prefill(stays)))
        # Nobody reserves for this one: all ranks give up when its time is over.
        unwanted = router.start_prefill(stranger, timeout_s=0.3)
        await router.cancel(long.request_id)
        await router.collect(long.request_id, "stays")
        assert router.last("stays").finish_reason == "length"
        assert router.prefill_instances["stays"] == "prefill-0"
        await staying
        for refused in (call, unwanted):
            with pytest.raises(grpc.aio.AioRpcError):
                await refused
        await router.wait_until_settled()
        await router.close()


async def test_a_prefill_that_never_comes_is_computed_by_all_decode_ranks(model: Path) -> None:
    async with ranks(model, {**TWO, "decode.pipeline_parallel": 2}) as started:
        router = await started.router()
        sent = requests()[:2]
        await router.submit(sent[0], remote=True, handover_timeout_s=0.2)
        await router.submit(sent[1], remote=True)
        await router.prefill_failed(sent[1].request_id)
        assert await router.collect(*(each.request_id for each in sent)) == alone(model)[:2]
        await router.wait_until_settled()
        await router.close()


@pytest.mark.parametrize(("role", "rank", "driver"), [("prefill", 0, 1), ("decode", 1, 0)])
async def test_a_lost_rank_ends_its_instance_and_no_other(model: Path, role: str, rank: int, driver: int) -> None:
    async with ranks(model, TWO) as started:
        started.kill(role, rank)
        task = started.tasks[f"{role}-0", driver]
        await asyncio.wait_for(started.registry.until_dead(f"{role}-0"), 10)
        detail = started.registry.statuses[f"{role}-0"].detail
        assert f"rank {rank} of {role}-0" in detail, detail
        with pytest.raises(UnavailableError, match=f"rank {rank} of {role}-0"):
            await asyncio.wait_for(task, 10)
        other = "decode" if role == "prefill" else "prefill"
        assert started.registry.statuses[f"{other}-0"].state == "ready"
        assert not any(task.done() for key, task in started.tasks.items() if key[0] == f"{other}-0")


async def test_a_rank_of_another_start_is_refused(model: Path) -> None:
    async with ranks(model, TWO) as started:
        stranger = Placement(instance_id="decode-0", start_id="start", rank=1, num_ranks=2)
        with pytest.raises(UnavailableError, match="rank 1 of 2 is the driver's, has joined before"):
            await DriverLink.join(started.address, stranger, b"x" * 16, 5)
        address = await started.registry.Meet(pb.MeetRequest(instance_id="decode-0", start_id="start"), None)
        await started.registry.Meet(
            pb.MeetRequest(instance_id="decode-0", start_id="old", driver_address=address.driver_address), None
        )
        with pytest.raises(UnavailableError, match="this is decode-0 start start, not decode-0 start old"):
            await DriverLink.join(started.address, dataclasses.replace(stranger, start_id="old"), b"x" * 16, 5)
        assert not any(task.done() for task in started.tasks.values())
