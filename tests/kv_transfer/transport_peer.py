"""The sending half of a link in a process of its own, driven over a pipe: for the conformance suite."""

from __future__ import annotations

import hashlib
import os
import threading
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from fake_cuda import FakeCudaIpc, FakeCudaIpcFar, FakeNccl

from baton.kv_transfer.transports.base import ReceiveLink, SendLink, Staged, Transport
from baton.kv_transfer.transports.choice import GPU_ONLY
from baton.kv_transfer.transports.faulty import FaultyTransport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.select import make_transports
from baton.kv_transfer.transports.shm import ShmTransport

SETUP_S = 15.0
# Of this test process alone: others on this host have segments of their own.
FOLDER = Path(f"/dev/shm/baton-tests-{os.getpid()}-transports")


def make_transport(name: str, arena_bytes: int, *, folder: Path = FOLDER, gpu: int = 0) -> Transport:
    if name.startswith("faulty_"):
        return FaultyTransport(make_transport(name.removeprefix("faulty_"), arena_bytes, folder=folder, gpu=gpu))
    if name in GPU_ONLY:
        return make_transports(name, arena_bytes=arena_bytes, device=f"cuda:{gpu}")[0]
    if name == "shm":
        return ShmTransport(arena_bytes=arena_bytes, folder=folder)
    kinds = {kind.name: kind for kind in (GlooTransport, FakeCudaIpc, FakeCudaIpcFar, FakeNccl)}
    return kinds[name](arena_bytes=arena_bytes)


def payload_of(num_bytes: int, seed: int) -> torch.Tensor:
    """The bytes that both sides expect: cheap to make, different for each seed and at each place."""
    block = torch.frombuffer(bytearray(hashlib.shake_256(str(seed).encode()).digest(4099)), dtype=torch.uint8)
    return block.repeat(-(-num_bytes // block.numel()))[:num_bytes]


def in_one_process(transport: Transport) -> tuple[SendLink, ReceiveLink]:
    """Both halves of a link."""
    setup = transport.open_send(peer="receiver")
    answer = transport.open_receive(setup.options, peer="sender")
    links: list[ReceiveLink] = []
    thread = threading.Thread(target=lambda: links.append(answer.finish(SETUP_S)))
    thread.start()
    send = setup.finish(answer.options, SETUP_S)
    thread.join(SETUP_S)
    return send, links[0]


def send_in_process(pipe: Connection, name: str, arena_bytes: int, folder: Path) -> None:
    """Serve commands until the pipe closes: ("post", num_bytes, seed, deadline_s), ("release", index), ("close",)."""
    torch.set_num_threads(1)
    transport = make_transport(name, arena_bytes, folder=folder, gpu=torch.cuda.device_count() - 1)
    setup = transport.open_send(peer="receiver")
    pipe.send(setup.options)
    link: SendLink = setup.finish(pipe.recv(), SETUP_S)
    pipe.send("up")
    held: list[Staged] = []
    while True:
        try:
            command: tuple[Any, ...] = pipe.recv()
        except EOFError:
            return
        match command:
            case ("post", num_bytes, seed, deadline_s):
                try:
                    staged = link.stage(num_bytes, deadline_s)
                    with link.filling():
                        staged.payload.copy_(payload_of(num_bytes, seed))
                    held.append(staged)
                    pipe.send(link.post(staged))
                except Exception as error:
                    pipe.send(error)
            case ("release", index):
                link.release(held[index])
                pipe.send(link.staged_bytes)
            case ("close",):
                link.close()
                transport.close()
                pipe.send("closed")
                return
