"""What a faulty transport does to links, payloads and lanes; without rules it passes the conformance suite."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
import torch
from transport_peer import SETUP_S, in_one_process, payload_of

from baton import faults
from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports.base import ReceiveLink, SendLink, Staged, Transport
from baton.kv_transfer.transports.faulty import LOST, FaultyTransport
from baton.kv_transfer.transports.lane import Lane
from baton.kv_transfer.transports.select import make_transports

NUM_BYTES = 1000
DEADLINE_S = 10.0
HELD_S = 0.15


class Pair:
    """Both halves of a link in this process."""

    def __init__(self, name: str) -> None:
        self.transport: Transport = make_transports(name, arena_bytes=1 << 20)[0]
        self.send: SendLink
        self.receive: ReceiveLink
        self.send, self.receive = in_one_process(self.transport)

    def stage(self, deadline_s: float = DEADLINE_S) -> Staged:
        staged = self.send.stage(NUM_BYTES, deadline_s)
        with self.send.filling():
            staged.payload.copy_(payload_of(NUM_BYTES, 1))
        return staged

    def fetch(self, locator: str, deadline_s: float = DEADLINE_S) -> torch.Tensor:
        payload = self.receive.fetch(locator, NUM_BYTES, deadline_s)
        with self.receive.reading():
            came = payload.clone()
        self.receive.done(payload)
        return came

    def lanes(self) -> tuple[Lane, Lane]:
        assert self.send.lane is not None
        assert self.receive.lane is not None
        return self.send.lane, self.receive.lane

    def close(self) -> None:
        self.send.close()
        self.receive.close()
        self.transport.close()


Make = Callable[..., Pair]


@pytest.fixture
def make() -> Iterator[Make]:
    """A pair under rules, with both halves in this process."""
    with ExitStack() as stack:
        stack.callback(faults.install, [], instance_id="", role="")

        def with_rules(*rules: str, name: str = "shm") -> Pair:
            faults.install([f"any {rule}" for rule in rules], instance_id="decode-0", role="decode")
            pair = Pair(name)
            stack.callback(pair.close)
            return pair

        yield with_rules


def _bits_that_differ(came: torch.Tensor) -> int:
    return sum(bin(byte).count("1") for byte in (came ^ payload_of(NUM_BYTES, 1)).tolist())


def test_transports_are_decorated_where_faults_are_possible_only(make: Make) -> None:
    faults.install([], instance_id="decode-0", role="decode")
    assert [type(transport).__name__ for transport in make_transports("auto")] == ["ShmTransport", "GlooTransport"]
    faults.install([], instance_id="decode-0", role="decode", allow_at_runtime=True)
    assert all(isinstance(transport, FaultyTransport) for transport in make_transports("auto"))
    faults.install(["prefill-0 step kill"], instance_id="decode-0", role="decode")
    assert isinstance(make_transports("gloo")[0], FaultyTransport)
    assert faults.active is None


@pytest.mark.parametrize("name", ["shm", "gloo"])
@pytest.mark.parametrize("point", ["post", "fetch"])
def test_one_bit_flips_in_the_payload_that_the_rule_names(make: Make, name: str, point: str) -> None:
    pair = make(f"transfer.{point} nth=2 flip seed=5", name=name)
    differ = [_bits_that_differ(pair.fetch(pair.send.post(pair.stage()))) for _ in range(3)]
    assert differ == [0, 1, 0]


@pytest.mark.parametrize("name", ["shm", "gloo"])
@pytest.mark.parametrize("point", ["post", "fetch"])
def test_half_of_a_truncated_payload_never_comes(make: Make, name: str, point: str) -> None:
    pair = make(f"transfer.{point} nth=1 truncate", name=name)
    came = pair.fetch(pair.send.post(pair.stage()))
    assert torch.equal(came[: NUM_BYTES // 2], payload_of(NUM_BYTES, 1)[: NUM_BYTES // 2])
    assert not came[NUM_BYTES // 2 :].any()


@pytest.mark.parametrize("name", ["shm", "gloo"])
@pytest.mark.parametrize("point", ["post", "fetch"])
def test_a_dropped_payload_is_waited_for_until_the_deadline_and_the_link_is_broken(
    make: Make, name: str, point: str
) -> None:
    pair = make(f"transfer.{point} nth=1 drop", name=name)
    locator = pair.send.post(pair.stage())
    assert (locator == LOST) == (point == "post")
    with pytest.raises(DeadlineError, match=r"fetching 1000 bytes from sender did not end within 0\.15 s"):
        pair.fetch(locator, HELD_S)
    with pytest.raises(HandoverError, match="is broken"):
        pair.fetch(pair.send.post(pair.stage()))


@pytest.mark.parametrize("name", ["shm", "gloo"])
def test_a_payload_that_is_posted_twice_comes_once(make: Make, name: str) -> None:
    pair = make("transfer.post nth=1 duplicate", name=name)
    for _ in range(3):
        assert _bits_that_differ(pair.fetch(pair.send.post(pair.stage()))) == 0


@pytest.mark.parametrize(
    "rule", ["stage delay for=0.15", "post hang for=0.15", "fetch slow rate=6000", "setup delay for=0.15"]
)
def test_what_takes_longer_comes_all_the_same(make: Make, rule: str) -> None:
    began_s = time.monotonic()
    pair = make(f"transfer.{rule}")
    assert _bits_that_differ(pair.fetch(pair.send.post(pair.stage()))) == 0
    assert time.monotonic() - began_s >= HELD_S


def test_a_fetch_slower_than_its_deadline_ends_at_it(make: Make) -> None:
    pair = make("transfer.fetch slow rate=1")
    began_s = time.monotonic()
    with pytest.raises(DeadlineError):
        pair.fetch(pair.send.post(pair.stage()), HELD_S)
    assert HELD_S <= time.monotonic() - began_s < DEADLINE_S / 2


@pytest.mark.parametrize("point", ["stage", "post", "fetch"])
def test_failures_are_those_of_a_data_path(make: Make, point: str) -> None:
    pair = make(f"transfer.{point} nth=1 fail")
    with pytest.raises(HandoverError, match=rf"fault any transfer\.{point} nth=1 fail"):
        pair.fetch(pair.send.post(pair.stage()))


@pytest.mark.parametrize("point", ["stage", "post", "fetch"])
def test_whatever_hangs_ends_when_the_link_is_closed(make: Make, point: str) -> None:
    pair = make(f"transfer.{point} hang")
    errors: list[BaseException] = []

    def use() -> None:
        try:
            pair.fetch(pair.send.post(pair.stage(30.0)), 30.0)
        except HandoverError as error:
            errors.append(error)

    thread = threading.Thread(target=use)
    thread.start()
    time.sleep(HELD_S)
    assert thread.is_alive()
    pair.close()
    thread.join(DEADLINE_S)
    assert "closed" in str(errors[0])


def test_a_transport_that_is_refused_cannot_be_opened(make: Make) -> None:
    faults.install(["any transfer.setup nth=2 refuse"], instance_id="decode-0", role="decode")
    transport = make_transports("shm")[0]
    setup = transport.open_send(peer="receiver")
    with pytest.raises(HandoverError, match=r"fault any transfer\.setup nth=2 refuse"):
        transport.open_receive(setup.options, peer="sender")
    setup.cancel()


@pytest.mark.parametrize("rule", ["fail", "hang"])
def test_a_setup_that_fails_is_undone(make: Make, rule: str) -> None:
    faults.install([f"any transfer.setup nth=1 {rule}"], instance_id="decode-0", role="decode")
    transport = make_transports("shm")[0]
    setup = transport.open_send(peer="receiver")
    with pytest.raises((HandoverError, DeadlineError)):
        setup.finish({}, HELD_S)
    again = transport.open_send(peer="receiver")
    again.cancel()


def test_peers_are_named_by_instance_rank_or_role(make: Make) -> None:
    faults.install(["any transfer.setup peer=decode-1 refuse"], instance_id="prefill-0", role="prefill")
    transport = make_transports("shm")[0]
    for refused in ("decode-1", "decode-1.3/00ff00ff"):
        with pytest.raises(HandoverError):
            transport.open_send(peer=refused)
    transport.open_send(peer="decode-0/00ff00ff").cancel()


@pytest.mark.parametrize(
    ("rule", "expected"),
    [
        ("", [b"one", b"two", b"three"]),
        ("rpc.send nth=2 drop", [b"one", b"three"]),
        ("rpc.receive nth=2 duplicate", [b"one", b"two", b"two", b"three"]),
        ("rpc.send nth=3 truncate", [b"one", b"two", b"th"]),
        ("rpc.send method=Handover.Ship nth=2 blackhole", [b"one"]),
        ("rpc.receive nth=1 delay for=0.15", [b"one", b"two", b"three"]),
        ("rpc.receive slow rate=60", [b"one", b"two", b"three"]),
        ("rpc.send nth=3 fail", [b"one", b"two"]),
        ("rpc.send method=Decode.Stream drop", [b"one", b"two", b"three"]),
    ],
)
def test_messages_of_a_lane(make: Make, rule: str, expected: list[bytes]) -> None:
    began_s = time.monotonic()
    pair = make(rule or "step kill")
    ours, theirs = pair.lanes()
    for message in (b"one", b"two", b"three"):
        assert ours.send(message)
    assert [theirs.receive(wait=True) for _ in expected] == expected
    if "rate" in rule or "delay" in rule:
        assert time.monotonic() - began_s >= HELD_S
    if "blackhole" in rule:
        assert theirs.send(b"back")
        assert ours.receive(wait=True) == b"back"
    if "blackhole" not in rule and "fail" not in rule:
        ours.close()
    if "blackhole" not in rule:
        assert theirs.receive(wait=True) == b""


@pytest.mark.parametrize("rule", ["step kill", "rpc.send hang", "rpc.receive hang"])
def test_a_faulty_lane_leaves_no_thread_and_no_descriptor(make: Make, rule: str) -> None:
    before = threading.active_count()
    pair = make(rule)
    ours, theirs = pair.lanes()
    assert ours.send(b"message")
    time.sleep(HELD_S / 3)
    pair.close()
    end_s = time.monotonic() + SETUP_S
    while threading.active_count() > before and time.monotonic() < end_s:
        time.sleep(0.01)
    assert threading.active_count() <= before
    assert (ours.fileno(), theirs.fileno()) == (-1, -1)
