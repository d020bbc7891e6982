"""When Ray's head is started again, and when it is left alone."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from baton.cluster.launchers.ray_head import PrivateHead


class StubProcess:
    """Runs until `returncode` is set."""

    def __init__(self) -> None:
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """As `subprocess.Popen.poll`."""
        return self.returncode


class StubNode:
    """As Ray's node of a head; `fails` is raised by a start."""

    def __init__(self) -> None:
        self.all_processes: dict[str, list[Any]] = {}
        self.num_starts = 0
        self.fails: Exception | None = None
        self.start_gcs_server()

    def kill_gcs_server(self, check_alive: bool = True) -> None:
        """Forget it."""
        assert not check_alive
        del self.all_processes["gcs_server"]

    def start_gcs_server(self) -> None:
        """Another one."""
        if self.fails is not None:
            raise self.fails
        self.num_starts += 1
        self.all_processes["gcs_server"] = [SimpleNamespace(process=StubProcess())]

    def die(self) -> None:
        """Its process ends."""
        self.all_processes["gcs_server"][0].process.returncode = -9


def head_of(node: StubNode, *, is_durable: bool = True) -> tuple[PrivateHead, list[str]]:
    told: list[str] = []
    head = PrivateHead(told.append)
    head._node, head._is_durable = node, is_durable
    return head, told


def test_a_head_that_dies_is_started_again_at_once_and_then_with_growing_pauses() -> None:
    node = StubNode()
    head, told = head_of(node)
    head.look(0.0)
    assert node.num_starts == 1
    now_s, starts_s = 0.0, []
    for _ in range(5):
        node.die()
        before = node.num_starts
        died_s = now_s
        while node.num_starts == before:
            head.look(now_s)
            now_s += 0.25
        starts_s.append(now_s - 0.25 - died_s)
    assert starts_s == [0.0, 0.5, 1.0, 2.0, 4.0]
    assert len(told) == 5


def test_a_head_that_held_is_forgiven_its_earlier_deaths() -> None:
    node = StubNode()
    head, _ = head_of(node)
    for now_s in (0.0, 100.0):
        node.die()
        before = node.num_starts
        head.look(now_s)
        assert node.num_starts == before + 1
        head.look(now_s + 50.0)


def test_a_head_without_a_store_is_not_started_again_and_told_of_once() -> None:
    node = StubNode()
    head, told = head_of(node, is_durable=False)
    node.die()
    for now_s in range(5):
        head.look(now_s)
    assert node.num_starts == 1
    assert len(told) == 1
    assert "does not come back: requests are served on" in told[0]


def test_a_head_that_cannot_be_started_is_told_of_and_ends_nothing() -> None:
    node = StubNode()
    head, told = head_of(node)
    node.die()
    node.fails = OSError("no such file")
    for now_s in range(5):
        head.look(now_s)
    assert len(told) == 1
    assert "no such file" in told[0]
