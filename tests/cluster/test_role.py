"""What a rank's process is told and sets up before its service runs."""

from __future__ import annotations

import pytest

from baton.cluster.launchers.base import host_of
from baton.cluster.role import num_threads
from baton.config import load_config


@pytest.mark.parametrize(("cores", "threads"), [(2, 1), (6, 1), (12, 2), (64, 10)])
def test_cores_are_shared_among_all_ranks(cores: int, threads: int) -> None:
    config = load_config(None, {"decode.tensor_parallel": 2, "decode.pipeline_parallel": 2, "prefill.replicas": 2})
    assert num_threads(config, cores) == threads
    assert num_threads(load_config(None, {"cpu.threads": 3}), cores) == 3


def test_auto_is_the_address_of_the_node() -> None:
    config = load_config(None, {"decode.host": "auto", "insecure": True})
    assert [host_of(config, role, "10.0.0.7") for role in ("decode", "prefill", "router")] == [
        "10.0.0.7",
        "127.0.0.1",
        "10.0.0.7",
    ]
