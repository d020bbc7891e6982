"""Pages that arrive damaged, under another ticket or from another process: refused, computed again, and counted.

One cluster of real processes. Its prefill and decode workers have fixed ports, so that one that is started anew is
another process behind the same address.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import time
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import httpx
import pytest
import torch
from cluster_process import Cluster, complete

from baton.engine.request import EngineRequest, SamplingParams
from baton.kv_transfer import pair_shipment
from baton.kv_transfer.checksum import payload_checksum
from baton.kv_transfer.handover import HandoverKey, Offer, TicketTerms
from baton.kv_transfer.peer import LocalPeer
from baton.kv_transfer.plan import PageRange
from baton.kv_transfer.sender import HandoverSender
from baton.kv_transfer.shipment import DecodeTarget, RankAddress
from baton.kv_transfer.transports.select import host_id, make_transports
from baton.kv_transfer.wire import FirstToken, offer_to_proto
from baton.proto.baton.v1 import worker_pb2 as pb
from baton.proto.baton.v1 import worker_pb2_grpc as rpc
from baton.proto.codec import layout_from_proto, request_to_proto
from baton.worker.runtime import PROTOCOL_VERSION

pytestmark = [pytest.mark.cluster, pytest.mark.timeout(200)]

NUM_LAYERS = 6
PROMPT = [40 + (7 * position) % 400 for position in range(150)]
OPTIONS: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "ignore_eos": True, "temperature": 0.8, "seed": 5}


def free_ports(count: int) -> int:
    """The first of so many ports in a row that nobody listens on."""
    for first in range(21000, 32000, 16):
        sockets = [socket.socket() for _ in range(count)]
        try:
            for offset, each in enumerate(sockets):
                each.bind(("127.0.0.1", first + offset))
            return first
        except OSError:
            continue
        finally:
            for each in sockets:
                each.close()
    raise AssertionError("no free ports")


@pytest.fixture(scope="module", name="cluster")
def _cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    port = free_ports(4)
    settings = {
        "kv.memory": "32MiB",
        "prefill.replicas": 3,
        "prefill.port": port,
        "decode.port": port + 3,
        "transfer.layers_per_group": 1,
        "transfer.one_message_below_tokens": 0,
        "faults.allow_at_runtime": "true",
        "routing.disaggregate": "always",
        "routing.policy": "least_loaded",
        "stop_grace_s": 5,
        # Attempts are counted: nobody is to be taken for lost for having stood still.
        "router.silence_s": 10,
    }
    with Cluster(tmp_path_factory.mktemp("refused"), **settings) as cluster:
        yield cluster


@pytest.fixture(scope="module", name="wanted")
def _wanted(cluster: Cluster) -> list[int]:
    return ask(cluster, "undisturbed")


def ask(cluster: Cluster, salt: str) -> list[int]:
    """Token ids of the answer; nothing of the prompt is cached under a salt of its own."""

    async def run() -> list[int]:
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            return (await complete(client, cluster.url, PROMPT, cache_salt=salt, **OPTIONS))[0]

    return asyncio.run(run())


def workers(cluster: Cluster) -> dict[str, pb.WorkerStatus]:
    """What the registry knows of the workers."""
    with grpc.insecure_channel(cluster.state["registry_address"]) as channel:
        found = rpc.RegistryStub(channel).GetCluster(pb.GetClusterRequest(), timeout=5.0).instances
    return {status.instance_id: status for status in found if status.role != "router"}


def counter(url: str, text: str) -> float:
    """The value of a counter whose line begins with `text`, 0 where it was never counted."""
    page = httpx.get(url, trust_env=False).text
    found = re.search(rf"^{re.escape(text)}\S* (\S+)$", page, re.MULTILINE)
    return float(found[1]) if found else 0.0


def refused(cluster: Cluster, cause: str) -> float:
    return counter(workers(cluster)["decode-0"].metrics_url, f'baton_kv_refused_total{{reason="{cause}"')


def attached(cluster: Cluster) -> float:
    return counter(workers(cluster)["decode-0"].metrics_url, 'baton_handovers_total{outcome="attached"')


def retries(cluster: Cluster, outcome: str) -> float:
    return counter(f"{cluster.url}/metrics", f'baton_prefill_retries_total{{outcome="{outcome}"')


def arm(status: pb.WorkerStatus, *rules: str) -> None:
    with grpc.insecure_channel(status.address) as channel:
        rpc.WorkerStub(channel).SetFaults(pb.SetFaultsRequest(rules=rules), timeout=5.0)


def arm_first(cluster: Cluster, fault: str) -> pb.WorkerStatus | None:
    """Of several that are idle the router takes the first. None where it would have nobody else to go on with."""
    ready = [s for _, s in sorted(workers(cluster).items()) if s.role == "prefill" and s.state == "ready"]
    with contextlib.suppress(grpc.RpcError):
        for status in ready:
            arm(status)  # it lives
        if len(ready) > 1:
            arm(ready[0], f"{ready[0].instance_id} {fault}")
            return ready[0]
    time.sleep(0.05)
    return None


def disarm(status: pb.WorkerStatus) -> None:
    """Another one was taken, which came back meanwhile; or it is dead."""
    with contextlib.suppress(grpc.RpcError):
        arm(status)


def until_whole(cluster: Cluster) -> dict[str, pb.WorkerStatus]:
    """Every worker is ready, and none owns a block."""
    until_s = time.monotonic() + 60
    while True:
        found = workers(cluster)
        if len(found) == 4 and all(s.state == "ready" and not s.load.kv_blocks_owned for s in found.values()):
            return found
        assert time.monotonic() < until_s, cluster.log()
        time.sleep(0.05)


def until_new(cluster: Cluster, before: pb.WorkerStatus) -> pb.WorkerStatus:
    """Another process behind the same address has taken its place."""
    until_s = time.monotonic() + 60
    while (after := until_whole(cluster)[before.instance_id]).incarnation == before.incarnation:
        assert time.monotonic() < until_s, cluster.log()
        time.sleep(0.05)
    assert after.address == before.address
    return after


def test_a_flipped_bit_is_refused_and_the_prompt_computed_again(cluster: Cluster, wanted: list[int]) -> None:
    found = until_whole(cluster)
    before = refused(cluster, "checksum")
    prefills = [status for status in found.values() if status.role == "prefill"]
    for status in prefills:
        arm(status, f"{status.instance_id} transfer.post nth=1 flip")
    assert ask(cluster, "flipped") == wanted
    for status in prefills:
        arm(status)
    assert refused(cluster, "checksum") == before + 1
    until_whole(cluster)


def test_a_prefill_worker_that_is_killed_after_each_layer_group(cluster: Cluster, wanted: list[int]) -> None:
    first = until_whole(cluster)
    for group in range(1, NUM_LAYERS + 1):
        before, until_s = retries(cluster, "attached"), time.monotonic() + 60
        while retries(cluster, "attached") == before:
            assert time.monotonic() < until_s, cluster.log()
            target = arm_first(cluster, f"layers nth={group} kill")
            if target is not None:
                assert ask(cluster, f"{group} at {until_s}") == wanted
                disarm(target)
    now = until_whole(cluster)
    assert {name: status.address for name, status in now.items()} == {n: status.address for n, status in first.items()}
    assert now["prefill-0"].incarnation != first["prefill-0"].incarnation
    # The new process behind the old address serves, and its pages are taken.
    before = attached(cluster)
    assert ask(cluster, "after all") == wanted
    assert attached(cluster) == before + 1


class _Stranger:
    """A prefill worker of the test's own, and a router, towards one decode worker."""

    def __init__(self, status: pb.WorkerStatus) -> None:
        self.status = status
        self.peer = LocalPeer(
            instance_id="stranger",
            incarnation=os.urandom(16),
            model_fingerprint=status.model_fingerprint,
            layout=layout_from_proto(status.layout),
            host_id=host_id(),
        )
        self.transports = make_transports("auto", host="127.0.0.1", arena_bytes=1 << 20, rate_limit_gbit_s=None)
        self.sender = HandoverSender(self.peer, transports=self.transports, checksum=payload_checksum)
        self.sender.start()

    async def close(self) -> None:
        await self.sender.close()
        for transport in self.transports:
            transport.close()

    async def submit(self, request_id: str, was_refused: Callable[[], bool]) -> list[int]:
        """Has the decode worker wait for pages, ships zeros, and returns the tokens that it writes."""
        sampling = SamplingParams(max_tokens=12, temperature=0.8, seed=5, ignore_eos=True)
        request = EngineRequest(request_id=request_id, prompt_token_ids=tuple(PROMPT), sampling=sampling)
        ids: list[int] = []
        async with grpc.aio.insecure_channel(self.status.address) as channel:
            call: Any = rpc.DecodeStub(channel).Stream()
            hello = pb.Hello(router_id="test", protocol_version=PROTOCOL_VERSION)
            submit = pb.Submit(request=request_to_proto(request), remote_prefill=True, handover_timeout_s=20.0)
            await call.write(pb.DecodeCommand(hello=hello, seq=1))
            await call.write(pb.DecodeCommand(submit=submit, seq=2))
            target = DecodeTarget((RankAddress(self.status.address, self.status.incarnation),))
            shipment = self.sender.begin(HandoverKey(request_id, 0), target, 10.0)
            shipment.offer(0, NUM_LAYERS, 0, len(PROMPT), _zeros)
            shipment.complete(FirstToken(token_id=1))
            while not was_refused():
                await asyncio.sleep(0.05)
            # It is told of another epoch than its own, and does not listen.
            assert shipment.failure is None
            shipment.abort("all was refused")
            while len(ids) < 12:
                event = await asyncio.wait_for(call.read(), 20)
                ids += [token_id for output in event.step.outputs for token_id in output.token_ids]
        return ids


def _zeros(pages: PageRange, out: torch.Tensor) -> None:
    out.zero_()


async def _status(address: str) -> pb.WorkerStatus:
    async with grpc.aio.insecure_channel(address) as channel:
        return await rpc.WorkerStub(channel).GetStatus(pb.GetStatusRequest(), timeout=5.0)


def test_a_stale_epoch_is_refused(cluster: Cluster, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    def stale(offer: Offer, terms: TicketTerms, incarnation: bytes) -> pb.PageOffer:
        message = offer_to_proto(offer, terms, incarnation)
        message.epoch += 1
        return message

    async def run() -> list[int]:
        stranger = _Stranger(await _status(address))
        try:
            return await asyncio.wait_for(stranger.submit("stale", lambda: refused(cluster, "epoch") > before), 30)
        finally:
            await stranger.close()

    address = until_whole(cluster)["decode-0"].address
    before = refused(cluster, "epoch")
    monkeypatch.setattr(pair_shipment, "offer_to_proto", stale)
    assert asyncio.run(run()) == wanted
    until_whole(cluster)


def test_a_decode_worker_that_was_restarted_behind_its_address(cluster: Cluster, wanted: list[int]) -> None:
    before = until_whole(cluster)["decode-0"]
    os.kill(before.ranks[0].pid, signal.SIGKILL)
    after, old = until_new(cluster, before), before.incarnation
    count = refused(cluster, "incarnation")

    async def run() -> None:
        # A prefill worker is sent to the process that is gone, by a router that has not heard of it.
        request = EngineRequest(
            request_id="late", prompt_token_ids=tuple(PROMPT), sampling=SamplingParams(max_tokens=1)
        )
        late = pb.PrefillRequest(
            request=request_to_proto(request), decode_address=after.address, decode_incarnation=old, timeout_s=10.0
        )
        async with grpc.aio.insecure_channel(workers(cluster)["prefill-0"].address) as channel:
            with pytest.raises(grpc.aio.AioRpcError, match="not the process") as caught:
                await rpc.PrefillStub(channel).Prefill(late, timeout=20.0)
        assert caught.value.code() is grpc.StatusCode.FAILED_PRECONDITION
        # One that has a link to the new process asks it for the old one's ticket.
        stranger = _Stranger(await _status(after.address))
        try:
            link = await stranger.sender.link(after.address)
            ticket = pb.TicketRequest(request_id="late", receiver_incarnation=old)
            link.send(pb.ShipMessage(ticket_request=ticket))
            until_s = time.monotonic() + 10
            while refused(cluster, "incarnation") == count:
                assert time.monotonic() < until_s
                await asyncio.sleep(0.05)
        finally:
            await stranger.close()

    asyncio.run(run())
    assert ask(cluster, "restarted") == wanted
    until_whole(cluster)
