"""Which GPU a rank gets: in turn, one of its own where there are enough, and all others still visible."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from baton.cluster.controller import StartInstance
from baton.cluster.gpus import gpu_environment, gpu_index, visible_gpus
from baton.cluster.launchers.local import LocalLauncher
from baton.config import ClusterConfig, load_config

TWO_BY_TWO = {"prefill.replicas": 2, "prefill.tensor_parallel": 2, "decode.replicas": 1, "decode.tensor_parallel": 4}


def config_of(**overrides: object) -> ClusterConfig:
    return load_config(None, overrides)


def places(config: ClusterConfig) -> list[tuple[str, int, int]]:
    return [
        (role, index, rank)
        for role in ("prefill", "decode")
        for index in range(config.pool(role).replicas)
        for rank in range(config.num_ranks_of(role))
    ]


def test_enough_gpus_give_each_rank_its_own() -> None:
    config = load_config(None, TWO_BY_TWO)
    assert [gpu_index(config, *place, 8) for place in places(config)] == list(range(8))


def test_ranks_of_one_instance_do_not_share_while_there_are_enough_for_them() -> None:
    config = load_config(None, TWO_BY_TWO)
    gpus = {place: gpu_index(config, *place, 4) for place in places(config)}
    for role, index in (("prefill", 0), ("prefill", 1), ("decode", 0)):
        own = [gpu for (r, i, _), gpu in gpus.items() if (r, i) == (role, index)]
        assert len(set(own)) == len(own)
    shares = [list(gpus.values()).count(gpu) for gpu in range(4)]
    assert shares == [2, 2, 2, 2], "as even as can be"


def test_one_gpu_is_everybodys() -> None:
    config = config_of()
    assert {gpu_index(config, *place, 1) for place in places(config)} == {0}
    assert gpu_environment(config, "decode", 0, 0, ("0",)) == {}


def test_a_ranks_own_gpu_comes_first_and_the_others_stay_visible() -> None:
    config = config_of(device="cuda")
    assert gpu_environment(config, "prefill", 0, 0, ("4", "5", "6")) == {"CUDA_VISIBLE_DEVICES": "4,5,6"}
    assert gpu_environment(config, "decode", 0, 0, ("4", "5", "6")) == {"CUDA_VISIBLE_DEVICES": "5,4,6"}
    assert gpu_environment(config, "router", 0, 0, ("4", "5", "6")) == {}
    assert gpu_environment(config_of(device="cpu"), "decode", 0, 0, ("4", "5")) == {}


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("0,1", ("0", "1")),
        (" GPU-a , GPU-b", ("GPU-a", "GPU-b")),
        ("", ()),
        ("-1", ()),
        ("2,-1,3", ("2",)),
        ("3", ("3",)),
    ],
)
def test_gpus_are_those_that_the_environment_lists(listed: str, expected: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "nvidia0").touch()
    assert visible_gpus({"CUDA_VISIBLE_DEVICES": listed}, tmp_path) == expected


def test_without_a_list_they_are_those_of_the_machine(tmp_path: Path) -> None:
    assert visible_gpus({}, tmp_path) == ()
    for name in ("nvidia0", "nvidia1", "nvidia10", "nvidiactl", "nvidia-uvm", "nvidia-modeset"):
        (tmp_path / name).touch()
    assert visible_gpus({}, tmp_path) == ("0", "1", "2")


async def test_launcher_local_tells_each_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,3")
    config = config_of(device="cuda", **{"decode.tensor_parallel": 2})
    show = "import os, sys; sys.stdin.read(); print(os.environ['CUDA_VISIBLE_DEVICES'], flush=True)"
    launcher = LocalLauncher(config, tmp_path, command=(sys.executable, "-c", show))
    await launcher.start(StartInstance("decode-0", "decode", 0), "127.0.0.1:1")
    async with asyncio.timeout(20):
        while any(rank.process.poll() is None for rank in launcher._launched["decode-0"].ranks):
            await asyncio.sleep(0.02)
    await launcher.close()
    said = {path.name: path.read_text().split()[-1] for path in await asyncio.to_thread(lambda: [*tmp_path.iterdir()])}
    assert sorted(said.values()) == ["3,7", "7,3"]
    assert said["decode-0-rank0.log"] == "3,7", "rank 0 of decode-0 comes behind the one prefill rank"
