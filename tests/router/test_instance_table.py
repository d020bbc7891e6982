"""The router's table of workers: what a list may take from it, and what not."""

from __future__ import annotations

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.instances import InstanceTable


def _status(role: str = "decode", incarnation: bytes = b"A", state: str = "ready", running: int = 0) -> pb.WorkerStatus:
    return pb.WorkerStatus(
        instance_id=f"{role}-0",
        role=role,
        state=state,
        incarnation=incarnation,
        address="127.0.0.1:1",
        load=pb.WorkerLoad(running_requests=running),
    )


def test_a_stream_that_stands_beats_every_list() -> None:
    table = InstanceTable()
    table.apply([_status()])
    instance = table.all()[0]
    instance.connected = True
    for statuses in ([], [_status(state="dead")], [_status(incarnation=b"", state="starting")]):
        table.apply(statuses)
        assert table.prune() == []
        assert table.all() == [instance]
    instance.connected = False
    assert table.prune() == [instance]
    table.apply([_status(incarnation=b"", state="starting")])
    assert table.all()[0].status.state == "starting"
    table.apply([_status(incarnation=b"B")])
    assert [each.status.incarnation for each in table.all()] == [b"B"]


def test_a_status_that_is_given_again_says_nothing_new_about_the_load() -> None:
    table = InstanceTable()
    status = _status("prefill", running=1)
    table.apply([status])
    instance = table.all()[0]
    instance.load = pb.WorkerLoad(running_requests=5)
    table.apply([status])
    assert instance.load.running_requests == 5
    table.apply([_status("prefill", running=2)])
    assert instance.load.running_requests == 2
