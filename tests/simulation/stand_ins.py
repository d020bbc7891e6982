"""What is replaced under the product while a simulation runs, all in one list: `standing_in`.

Nothing of the product's own logic is on it: only what reaches the machine (clocks, threads, sockets, memory segments,
the model, randomness, the process's end) and what is slow to build and the same each time (tokenizer, metrics).
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import grpc
from tests.simulation import threads
from tests.simulation.calls import Channel
from tests.simulation.model import EOS, VOCAB_SIZE
from tests.simulation.network import Server
from tests.simulation.process import Killed
from tests.simulation.threads import QUEUE, THREADING

import baton.clock
import baton.cluster.registry as registry
import baton.decode_worker.service as decode_service
import baton.decode_worker.worker as decode_worker
import baton.engine.loop as engine_loop
import baton.kv_transfer.link_threads as link_threads
import baton.kv_transfer.receiver as receiver
import baton.kv_transfer.receiver_link as receiver_link
import baton.kv_transfer.sender as sender
import baton.kv_transfer.sender_link as sender_link
import baton.kv_transfer.transports.base as transports_base
import baton.prefill_worker.service as prefill_service
import baton.prefill_worker.worker as prefill_worker
import baton.router.client as router_client
import baton.router.service as router_service
import baton.worker.peer as worker_peer
import baton.worker.runtime as worker_runtime
import baton.worker.threads as worker_threads
import baton.worker.watchdog as watchdog
from baton.engine.tokenizer import Tokenizer
from baton.metrics import Metrics
from baton.router.model_card import ModelCard
from baton.state.memory import MemoryState
from baton.state.open import is_shared

__all__ = ["counted", "no_output", "standing_in"]


_real_from_dir = Tokenizer.from_dir


@functools.cache
def _metrics(role: str) -> Metrics:
    """Families are slow to make; nobody in the simulation reads what they count."""
    return Metrics(role)


@functools.cache
def _tokenizer() -> Tokenizer:
    return _real_from_dir(Path(baton.clock.__file__).parent / "assets" / "tiny")


def standing_in(sim: Any) -> contextlib.ExitStack:
    """Puts the stand-ins in place for `sim` (a `SimCluster`); closing the stack takes them away."""
    world = sim.world

    def now_s(*_: object) -> float:
        process = world.current
        return world.now_s if process is None else process.loop.time()

    randomness = random.Random(f"{world.seed}/urandom")
    urandom: Callable[[int], bytes] = randomness.randbytes

    def exit_process(code: int) -> None:
        world.current.kill(f"exit code {code}")
        raise Killed

    def open_state(url: str, *, cluster: str = "") -> Any:
        del cluster
        return sim.open_state() if is_shared(url) else MemoryState()

    card = ModelCard(
        model_id="simulated",
        root="simulated",
        max_model_len=sim.config.model.max_model_len,
        vocab_size=VOCAB_SIZE,
        eos_token_ids=(EOS,),
        dtype="float32",
        created_s=0,
    )
    no_gc = SimpleNamespace(set_threshold=lambda *_: None)
    threads.use_processes(lambda: world.current)
    replaced: list[tuple[Any, str, Any]] = [
        (grpc.aio, "insecure_channel", lambda address, *_, **__: Channel(sim.network, world.current, address)),
        (grpc.aio, "server", lambda *_, **__: Server(sim.network, world.current)),
        (os, "urandom", urandom),
        (random, "_urandom", urandom),
        (baton.clock.MonotonicClock, "now_s", now_s),
        (router_client, "monotonic", now_s),
        (router_client, "time", now_s),
        (engine_loop, "threading", THREADING),
        (engine_loop, "queue", QUEUE),
        (engine_loop, "ops", SimpleNamespace(enter_cores=lambda: None, leave_cores=lambda: None)),
        (link_threads, "threading", THREADING),
        (link_threads, "queue", QUEUE),
        (link_threads, "os", SimpleNamespace(sched_yield=lambda: threads.sleep(1e-6))),
        (receiver, "threading", THREADING),
        (receiver_link, "threading", THREADING),
        (sender_link, "threading", THREADING),
        (transports_base, "threading", THREADING),
        (transports_base, "time", SimpleNamespace(monotonic=now_s)),
        (worker_threads, "threading", THREADING),
        (worker_runtime, "leave_out_what_stays", lambda: None),
        (worker_runtime, "Metrics", _metrics),
        (worker_runtime, "build_engine", sim.build_engine),
        (worker_peer, "host_id", lambda: "simulated-host"),
        (worker_runtime, "host_id", lambda: "simulated-host"),
        (watchdog, "os", SimpleNamespace(_exit=exit_process)),
        (watchdog, "logging", SimpleNamespace(shutdown=lambda: None)),
        (decode_worker, "rank_transports", sim.make_transports),
        (prefill_worker, "rank_transports", sim.make_transports),
        (decode_service, "sys", SimpleNamespace(setswitchinterval=lambda _: None)),
        (decode_service, "DecodeWorker", sim.make_decode_worker),
        (prefill_service, "PrefillWorker", sim.make_prefill_worker),
        (registry, "_listen_problem", lambda host, port: ""),
        (router_service, "gc", no_gc),
        (router_service, "leave_out_what_stays", lambda: None),
        (router_service, "open_state", open_state),
        (worker_runtime, "open_state", open_state),
        (router_service, "Metrics", _metrics),
        (router_service, "Doors", sim.make_doors),
        (router_service, "read_model_card", lambda *_, **__: card),
        (router_service.Tokenizer, "from_dir", lambda _: _tokenizer()),
    ]
    stack = contextlib.ExitStack()
    for owner, name, stand_in in replaced:
        # As mock.patch does, in a hundredth of the time.
        stack.callback(setattr, owner, name, owner.__dict__[name])
        setattr(owner, name, stand_in)
    for kind in (receiver.HandoverReceiver, sender.HandoverSender):
        stack.enter_context(mock.patch.dict(kind.__init__.__kwdefaults__, clock=now_s))
    return stack


def counted() -> dict[str, float]:
    """What the product's metrics have counted over all runs: what the runs have touched."""
    wanted = ("baton_resumes_total", "baton_handovers_total", "baton_preemptions_total", "baton_requests_total")
    found: dict[str, float] = {}
    for role in ("router", "decode", "prefill"):
        for line in _metrics(role).render().decode().splitlines():
            name, _, value = line.rpartition(" ")
            if name.startswith(wanted):
                found[name] = float(value)
    return found


@contextlib.contextmanager
def no_output() -> Iterator[None]:
    """Nothing that is dropped half-way at a run's end shall speak."""
    before, sys.unraisablehook = sys.unraisablehook, lambda _: None
    logging.disable()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.unraisablehook = before
        logging.disable(logging.NOTSET)
