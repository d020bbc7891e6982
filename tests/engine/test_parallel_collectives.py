"""A rank group between threads of one process: sums in rank order, and errors in time even where the store hangs."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import pytest
import torch

from baton.engine.collectives import RankGroup, host_store
from baton.errors import ConfigError, DeadlineError, UnavailableError

_T = TypeVar("_T")
_HOST = "127.0.0.1"


def on_all(count: int, work: Callable[[int], _T]) -> list[_T]:
    """`work(rank)` on a thread for each rank."""
    results: dict[int, _T] = {}
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = work(rank)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
        assert not thread.is_alive()
    if errors:
        raise errors[0]
    return [results[rank] for rank in range(count)]


def connect(count: int, port: int, deadline_s: float = 10.0) -> list[RankGroup]:
    return on_all(
        count,
        lambda rank: RankGroup.connect(
            store_host=_HOST,
            store_port=port,
            rank=rank,
            size=count,
            tensor_ranks=range(count),
            own_host=_HOST,
            name="group",
            deadline_s=deadline_s,
        ),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_run_in_rank_order_and_are_equal_everywhere(dtype: torch.dtype) -> None:
    store = host_store(_HOST)
    groups = connect(3, store.port)
    generator = torch.Generator().manual_seed(0)
    parts = [(torch.randn((7, 33), generator=generator) * 10.0**rank).to(dtype) for rank in range(3)]
    expected = (parts[0].float() + parts[1].float() + parts[2].float()).to(dtype)
    for rows in (7, 1, 3):
        for total in on_all(3, lambda rank, rows=rows: groups[rank].all_reduce(parts[rank][:rows])):  # type: ignore[misc]
            assert torch.equal(total, expected[:rows])
    columns = [1, 20, 12]
    pieces = expected.split(columns, dim=1)
    gathered = on_all(3, lambda rank: groups[rank].gather(pieces[rank], columns))
    assert torch.equal(gathered[0], expected)
    assert [len(rows) for rows in gathered] == [7, 0, 0]
    empty = on_all(3, lambda rank: groups[rank].gather(pieces[rank][:0], columns))
    assert [tuple(rows.shape) for rows in empty] == [(0, 33)] * 3
    assert on_all(3, lambda rank: groups[rank].all_gather_ints([rank, -rank])) == [[[0, 0], [1, -1], [2, -2]]] * 3
    for group in groups:
        group.close()


def test_closing_is_heard_at_once_and_the_reason_with_it() -> None:
    store = host_store(_HOST)
    groups = connect(2, store.port)
    kept = groups[1].receive(torch.empty(3), 0, "activations")
    groups[1].leave_reason("out of tea")
    timer = threading.Timer(0.2, groups[1].close)
    timer.start()
    begin_s = time.monotonic()
    with pytest.raises(UnavailableError, match="rank 0 of group, control: rank 1 failed: out of tea"):
        groups[0].receive(torch.empty(3), 1, "control").wait()
    assert time.monotonic() - begin_s < 5
    with pytest.raises(UnavailableError, match="the group is closed"):
        kept.wait()
    with pytest.raises(UnavailableError, match="the group is closed"):
        groups[1].send(torch.empty(3), 0, "control")


def test_ranks_that_do_not_come_are_an_error_in_time() -> None:
    store = host_store(_HOST)
    with pytest.raises(
        UnavailableError, match=r"rank 1 of late: not all of 2 ranks met at 127\.0\.0\.1:\d+ within 0\.5 s"
    ):
        RankGroup.connect(
            store_host=_HOST, store_port=store.port, rank=1, size=2, tensor_ranks=[1], name="late", connect_s=0.5
        )
    with pytest.raises(ConfigError, match=r"cannot listen on 127\.0\.0\.1"):
        host_store(_HOST, port=store.port)


def _host(pipe: Connection) -> None:
    store = host_store(_HOST)
    pipe.send(store.port)
    pipe.recv()


@contextmanager
def store_elsewhere() -> Iterator[tuple[int, Any]]:
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    process = context.Process(target=_host, args=(theirs,), daemon=True)
    process.start()
    try:
        assert ours.poll(30)
        yield ours.recv(), process
    finally:
        process.kill()
        process.join(5)


def test_a_store_that_hangs_delays_no_error() -> None:
    with store_elsewhere() as (port, process):
        groups = connect(2, port, deadline_s=0.3)
        os.kill(process.pid, signal.SIGSTOP)
        begin_s = time.monotonic()
        with pytest.raises(DeadlineError, match=r"rank 0 of group, control: rank 1 did not answer within \d+\.\d s"):
            groups[0].receive(torch.empty(3), 1, "control").wait()
        groups[0].leave_reason("nobody listens")
        assert time.monotonic() - begin_s < 5
        for group in groups:
            group.close()
