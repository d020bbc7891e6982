"""Collectives between GPUs, on gloo in NCCL's place: sums, columns, activations, and a rank that does not come."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import pytest
import torch

from baton.engine.collectives import RankGroup, host_store
from baton.engine.device_group import DeviceGroup, make_nccl_group
from baton.errors import BatonError, DeadlineError

_dist: Any = torch.distributed
_HOST = "127.0.0.1"
_CPU = torch.device("cpu")


def make_gloo_group(store: Any, rank: int, size: int, device: torch.device) -> Any:
    options = _dist.ProcessGroupGloo._Options()
    options._timeout = timedelta(seconds=5)
    options._devices = [_dist.ProcessGroupGloo.create_device(hostname=_HOST)]
    return _dist.ProcessGroupGloo(store, rank, size, options)


def on_all_ranks(tp: int, pp: int, work: Callable[[DeviceGroup, int], Any], deadline_s: float = 5.0) -> list[Any]:
    """What `work` gives on every rank, each on a thread with a group of its own."""
    store = host_store(_HOST)
    broken: list[BatonError] = []

    def run(rank: int) -> Any:
        client = _dist.TCPStore(_HOST, store.port, None, False, timedelta(seconds=5), wait_for_workers=False)
        stage = rank // tp * tp
        group = DeviceGroup(
            _dist.PrefixStore("start", client),
            rank=rank,
            tensor_ranks=range(stage, stage + tp),
            num_ranks=tp * pp,
            device=_CPU,
            deadline_s=deadline_s,
            on_broken=broken.append,
            make_group=make_gloo_group,
        )
        try:
            return work(group, rank)
        finally:
            group.close()

    with ThreadPoolExecutor(tp * pp) as executor:
        results = list(executor.map(run, range(tp * pp)))
    assert not broken
    return results


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sums_run_in_rank_order_and_are_equal_on_every_rank(dtype: torch.dtype) -> None:
    terms = [torch.randn(5, 7, generator=torch.Generator().manual_seed(rank)).to(dtype) * 10**rank for rank in range(3)]
    expected = ((terms[0].float() + terms[1]) + terms[2]).to(dtype)
    for result in on_all_ranks(3, 1, lambda group, rank: group.all_reduce(terms[rank])):
        assert torch.equal(result, expected)


def test_columns_of_unequal_widths_come_together() -> None:
    whole = torch.arange(2.0 * 7).view(2, 7)
    parts, widths = [whole[:, :3], whole[:, 3:]], (3, 4)
    for result in on_all_ranks(2, 1, lambda group, rank: group.gather_columns(parts[rank], widths)):
        assert torch.equal(result, whole)


def test_activations_pass_from_stage_to_stage() -> None:
    def work(group: DeviceGroup, rank: int) -> torch.Tensor:
        hidden = torch.full((4, 3), float(rank))
        if rank >= 2:
            hidden = group.receive(torch.full((4, 3), float("nan"))) + 10
        if rank < 4:
            group.send(hidden)
        return hidden

    results = on_all_ranks(2, 3, work)
    assert [float(result[0, 0]) for result in results] == [0, 1, 10, 11, 20, 21]


def test_a_rank_that_does_not_come_is_told_after_the_deadline() -> None:
    store = host_store(_HOST)
    broken: list[BatonError] = []
    told = threading.Event()

    def on_broken(error: BatonError) -> None:
        broken.append(error)
        told.set()

    def run(rank: int) -> None:
        client = _dist.TCPStore(_HOST, store.port, None, False, timedelta(seconds=5), wait_for_workers=False)
        group = DeviceGroup(
            _dist.PrefixStore("start", client),
            rank=rank,
            tensor_ranks=(0, 1),
            num_ranks=2,
            device=_CPU,
            deadline_s=0.3 if rank == 0 else 30.0,
            on_broken=on_broken,
            make_group=make_gloo_group,
        )
        if rank == 0:
            with pytest.raises(BatonError):
                group.all_reduce(torch.ones(3))
            with pytest.raises(DeadlineError):
                group.all_reduce(torch.ones(3))
        else:
            assert told.wait(10)
            group.close()

    with ThreadPoolExecutor(2) as executor:
        list(executor.map(run, range(2)))
    assert len(broken) == 1
    assert "rank 0, all-gather on cpu (stage of ranks 0, 1): not all ranks came within 0.3 s" in str(broken[0])


def test_host_group_hands_over_to_the_device_group_and_breaks_with_it() -> None:
    store = host_store(_HOST)

    def run(rank: int) -> tuple[torch.Tensor, bool]:
        group = RankGroup.connect(store_host=_HOST, store_port=store.port, rank=rank, size=2, tensor_ranks=(0, 1))
        group.connect_device(_CPU, make_group=make_gloo_group)
        assert group.device is not None
        total = group.device.all_reduce(torch.ones(2) * (rank + 1))
        group.close()
        return total, group.device is not None

    with ThreadPoolExecutor(2) as executor:
        for total, _ in executor.map(run, range(2)):
            assert torch.equal(total, torch.full((2,), 3.0))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two NVIDIA GPUs")
def test_nccl_sums_on_two_gpus() -> None:
    store = host_store(_HOST)

    def run(rank: int) -> torch.Tensor:
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
        client = _dist.TCPStore(_HOST, store.port, None, False, timedelta(seconds=60), wait_for_workers=False)
        group = DeviceGroup(
            client,
            rank=rank,
            tensor_ranks=(0, 1),
            num_ranks=2,
            device=device,
            deadline_s=30,
            on_broken=lambda error: None,
            make_group=make_nccl_group,
        )
        total = group.all_reduce(torch.full((1000,), rank + 1.0, device=device)).cpu()
        group.close()
        return total

    with ThreadPoolExecutor(2) as executor:
        for total in executor.map(run, range(2)):
            assert torch.equal(total, torch.full((1000,), 3.0))
