"""The disaggregated path without a cluster: prefill here, decode in another process on the same device.

    prefill (this process)                       decode (the other)
    engine.add(prefill_only)      <- reserved -- engine.add(remote_prefill), reservation opened
    pages, layer group by group   -- handover -> verified, written, landed
                                                 engine.attach, steps until the end
                                  <- tokens ---

Engines, handover protocol and transports are those of the workers; what is left out are router, registry and Ray. Both
processes share one GPU: each is given the blocks that it needs, and no more.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import os
from collections.abc import Sequence as SequenceOf
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import grpc
import torch

from gpu_model import make_engine

from baton.engine.engine import Engine  # isort: skip
from baton.engine.request import EngineRequest, SamplingParams  # isort: skip
from baton.engine.scheduler import StepPlan  # isort: skip
from baton.engine.sequence import Sequence  # isort: skip
from baton.kv_transfer.handover import Fail, HandoverKey  # isort: skip
from baton.kv_transfer.peer import LocalPeer  # isort: skip
from baton.kv_transfer.plan import PageRange  # isort: skip
from baton.kv_transfer.receiver import HandoverReceiver  # isort: skip
from baton.kv_transfer.sender import HandoverSender  # isort: skip
from baton.kv_transfer.shipment import DecodeTarget, RankAddress, Shipment  # isort: skip
from baton.kv_transfer.transports.select import host_id, make_transports  # isort: skip
from baton.kv_transfer.wire import FirstToken  # isort: skip
from baton.proto.baton.v1 import worker_pb2_grpc  # isort: skip

__all__ = ["Setting", "greedy_request", "open_engine", "tokens_of_pair"]

START_S = 90.0
REQUEST_S = 30.0
_ARENA_BYTES = 16 << 20
_IDLE_STEPS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What both processes agree on.

    Attributes:
        transport: that pages take; nothing else is offered.
        max_batch_tokens: smaller than prompts, so that these come in chunks.
    """

    folder: str
    device: str
    dtype: str
    transport: str
    num_blocks: int = 256
    block_size: int = 16
    max_batch_tokens: int = 64
    max_batch_size: int = 8
    max_model_len: int = 512


def open_engine(setting: Setting) -> Engine:
    """An engine of this setting."""
    return make_engine(
        Path(setting.folder),
        device=setting.device,
        dtype=setting.dtype,
        num_blocks=setting.num_blocks,
        block_size=setting.block_size,
        max_batch_tokens=setting.max_batch_tokens,
        max_batch_size=setting.max_batch_size,
        max_model_len=setting.max_model_len,
        deterministic=True,
        layers_per_group=2,
    )


def greedy_request(name: str, prompt: SequenceOf[int], max_tokens: int) -> EngineRequest:
    """Takes the most likely token each time, and never ends by itself."""
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)
    return EngineRequest(request_id=name, prompt_token_ids=tuple(prompt), sampling=sampling)


def _peer(name: str, engine: Engine) -> LocalPeer:
    runner = engine.runner
    return LocalPeer(
        instance_id=name,
        incarnation=os.urandom(16),
        model_fingerprint=runner.fingerprint,
        layout=runner.layout,
        host_id=host_id(),
    )


# ------------------------------------------------------------ the decode process


def _reserved(engine: Engine) -> Sequence:
    """The one sequence that gets its blocks next; steps ahead of it may still be in flight."""
    for _ in range(_IDLE_STEPS):
        if reserved := engine.step().plan.reserved:
            assert len(reserved) == 1, reserved
            return reserved[0]
    raise AssertionError("the engine reserves nothing")


async def _decode(pipe: Connection, setting: Setting) -> None:
    engine = open_engine(setting)
    landed: dict[HandoverKey, asyncio.Future[FirstToken]] = {}

    def on_landed(key: HandoverKey, token: FirstToken | None) -> None:
        assert token is not None
        landed[key].set_result(token)

    def on_failed(key: HandoverKey, failure: Fail) -> None:
        if not landed[key].done():
            landed[key].set_exception(RuntimeError(f"{key}: {failure.reason}"))

    def write(block_ids: tuple[int, ...], pages: PageRange, payload: torch.Tensor) -> int:
        return engine.pages.scatter(block_ids, pages.layers, pages.tokens, payload, heads=pages.heads)

    peer = _peer("decode-0", engine)
    transports = make_transports(setting.transport, device=engine.pages.device, arena_bytes=_ARENA_BYTES)
    receiver = HandoverReceiver(
        peer,
        transports=transports,
        write_pages=write,
        on_landed=on_landed,
        on_failed=on_failed,
        on_settled=lambda key: None,
        checksum=None,
    )
    server = grpc.aio.server()
    worker_pb2_grpc.add_HandoverServicer_to_server(receiver, server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    receiver.start()
    pipe.send((f"127.0.0.1:{port}", peer.incarnation))
    while (message := await asyncio.to_thread(pipe.recv)) is not None:
        name, prompt, max_tokens = message
        key = HandoverKey(name, 0)
        landed[key] = asyncio.get_running_loop().create_future()
        refusal = engine.add(greedy_request(name, prompt, max_tokens), remote_prefill=True)
        assert not refusal, refusal
        seq = _reserved(engine)
        blocks = tuple(seq.block_ids)
        receiver.open_reservation(key, blocks, cached_tokens=seq.num_computed, num_tokens=len(prompt))
        pipe.send("reserved")
        first = await asyncio.wait_for(landed[key], REQUEST_S)
        output = engine.attach((name, 0), first.token_id, None, first.cached_tokens)
        assert output is not None
        tokens = list(output.token_ids)
        while len(tokens) < max_tokens:
            for output in engine.step().outputs:
                assert not output.error, output.error
                tokens += output.token_ids
        pipe.send(tokens)
    await receiver.close()
    await server.stop(None)
    for transport in transports:
        transport.close()


def _decode_process(pipe: Connection, setting: dict[str, Any]) -> None:
    torch.set_num_threads(1)
    asyncio.run(_decode(pipe, Setting(**setting)))


# ------------------------------------------------------------ the prefill process


class _Other:
    """The decode process, and what it says in time."""

    def __init__(self, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self._process = context.Process(target=_decode_process, args=(theirs, asdict(setting)), daemon=True)
        self._process.start()
        theirs.close()

    async def receive(self, deadline_s: float) -> Any:
        """The next message.

        Raises:
            TimeoutError: none came.
            EOFError: the process has ended.
        """
        if not await asyncio.to_thread(self.pipe.poll, deadline_s):
            raise TimeoutError(f"the decode process said nothing for {deadline_s:g} s")
        return self.pipe.recv()

    def end(self) -> None:
        """Ends it, by force where it takes too long."""
        try:
            self.pipe.send(None)
            self._process.join(REQUEST_S)
        except OSError:
            pass
        if self._process.is_alive():
            self._process.kill()


class _Prefill:
    """One prompt's way through the prefill engine."""

    def __init__(self, engine: Engine, shipment: Shipment) -> None:
        self._engine = engine
        self._shipment = shipment

    def on_layers(self, plan: StepPlan, begin: int, end: int) -> None:
        for row in plan.rows:
            gather = partial(self._gather, list(row.seq.block_ids))
            self._shipment.offer(begin, end, row.start, row.start + row.count, gather)

    def _gather(self, blocks: list[int], pages: PageRange, out: torch.Tensor) -> int:
        return self._engine.pages.gather(blocks, pages.layers, pages.tokens, out, heads=pages.heads)


async def _ship(setting: Setting, prompts: SequenceOf[SequenceOf[int]], max_tokens: int) -> list[list[int]]:
    other = _Other(setting)
    try:
        engine = open_engine(setting)
        address, incarnation = await other.receive(START_S)
        transports = make_transports(setting.transport, device=engine.pages.device, arena_bytes=_ARENA_BYTES)
        sender = HandoverSender(_peer("prefill-0", engine), transports=transports, checksum=None)
        sender.start()
        target = DecodeTarget((RankAddress(address, incarnation),))
        answers = []
        for number, prompt in enumerate(prompts):
            name = f"pair-{number}"
            other.pipe.send((name, list(prompt), max_tokens))
            await other.receive(REQUEST_S)
            shipment = sender.begin(HandoverKey(name, 0), target, REQUEST_S)
            refusal = engine.add(greedy_request(name, prompt, 1), prefill_only=True)
            assert not refusal, refusal
            on_layers = _Prefill(engine, shipment).on_layers
            first: list[int] = []
            while not first:
                for output in engine.step(on_layers).outputs:
                    assert not output.error, output.error
                    first += output.token_ids
                # Messages of the handover go out meanwhile.
                await asyncio.sleep(0)
            shipment.complete(FirstToken(token_id=first[0]))
            await asyncio.wait_for(shipment.settled(), REQUEST_S)
            engine.release((name, 0))
            answers.append(await other.receive(REQUEST_S))
        await sender.close()
        for transport in transports:
            transport.close()
        return answers
    finally:
        other.end()


def tokens_of_pair(setting: Setting, prompts: SequenceOf[SequenceOf[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of each prompt, computed here and continued there, one prompt after the other."""
    return asyncio.run(_ship(replace(setting), prompts, max_tokens))
