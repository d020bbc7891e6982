"""What a rank's process is told and sets up before its service runs."""

from __future__ import annotations

import pytest

from baton.cluster.cores import cores_text, group_cores, num_threads
from baton.cluster.launchers.base import host_of
from baton.config import load_config


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (6, 1), (12, 2), (64, 10)])
def test_cores_are_shared_among_all_ranks(cores: int, threads: int) -> None:
    config = load_config(None, {"decode.tensor_parallel": 2, "decode.pipeline_parallel": 2, "prefill.replicas": 2})
    assert num_threads(config, "prefill", cores) == num_threads(config, "decode", cores) == threads
    assert num_threads(config, "router", cores) == 1
    assert num_threads(load_config(None, {"cpu.threads": 3}), "decode", cores) == 3


def test_a_pool_may_have_cores_and_threads_of_its_own() -> None:
    config = load_config(None, {"prefill.cpu.cores": "0-5", "decode.cpu.threads": 1, "prefill.replicas": 2})
    assert num_threads(config, "prefill", 8) == 3
    assert num_threads(config, "decode", 8) == 1
    assert group_cores(config) == {0: (0, 1, 2, 3, 4, 5)}
    text = cores_text(config, list(range(8)))
    assert "prefill 0-2 | 3-5 (as many" in text
    assert "decode 6-7 (1 threads)" in text


def test_the_cores_of_a_default_a_colocated_and_a_limited_start_are_told() -> None:
    assert "prefill 0 (" in cores_text(load_config(), [0, 1])
    assert "decode 1 (" in cores_text(load_config(), [0, 1])
    colocated = cores_text(load_config(None, {"prefill.replicas": 0}), [0, 1, 4])
    assert "decode 0-1,4 (" in colocated
    assert "prefill" not in colocated
    assert "not pinned" in cores_text(load_config(), [])


def test_auto_is_the_address_of_the_node() -> None:
    config = load_config(None, {"decode.host": "auto", "insecure": True})
    assert [host_of(config, role, "10.0.0.7") for role in ("decode", "prefill", "router")] == [
        "10.0.0.7",
        "127.0.0.1",
        "10.0.0.7",
    ]
