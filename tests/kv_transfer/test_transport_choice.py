"""Which transport a link uses: names in, names and readable reasons out; then end to end with one that fails."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Mapping

import pytest
from fake_workers import WAIT_S, DecodeWorker, PrefillWorker, eventually, make_peer

from baton.errors import ConfigError, DeadlineError, HandoverError, IncompatibleError
from baton.kv_transfer.transports import select
from baton.kv_transfer.transports.base import ReceiveLink, ReceiveSetup, SendLink, SendSetup, Transport
from baton.kv_transfer.transports.choice import TRANSPORT_NAMES, candidates, preference, why_none
from baton.kv_transfer.transports.failures import TransportFailures
from baton.kv_transfer.transports.select import available, make_transports
from baton.kv_transfer.transports.shm import ShmTransport

ARENA_BYTES = 64 << 10
ON_GPU = ("cuda_ipc", "nccl", "shm", "gloo")
ON_CPU = ("shm", "gloo")


@pytest.mark.parametrize(
    ("sender", "receiver", "same_host", "expected"),
    [
        (ON_GPU, ON_GPU, True, ("cuda_ipc", "nccl", "shm", "gloo")),
        (ON_GPU, ON_GPU, False, ("nccl", "gloo")),
        (ON_GPU, ON_CPU, True, ("shm", "gloo")),
        (ON_CPU, ON_GPU, True, ("shm", "gloo")),
        (ON_GPU, ON_CPU, False, ("gloo",)),
        (ON_CPU, ON_CPU, True, ("shm", "gloo")),
        (ON_CPU, ON_CPU, False, ("gloo",)),
        (("gloo", "shm"), ON_CPU, True, ("gloo", "shm")),
        (("nccl",), ON_CPU, True, ()),
        (("rdma", "gloo"), ON_CPU, True, ("gloo",)),
    ],
)
def test_the_first_of_the_senders_that_both_can_do(
    sender: tuple[str, ...], receiver: tuple[str, ...], same_host: bool, expected: tuple[str, ...]
) -> None:
    found = candidates(sender, receiver, sender_host_id="a", receiver_host_id="a" if same_host else "b")
    assert found == expected


def test_auto_is_every_transport_and_a_list_keeps_its_order() -> None:
    assert preference("auto") == TRANSPORT_NAMES == ON_GPU
    assert preference("gloo") == ("gloo",)
    assert preference(["gloo", "nccl"]) == ("gloo", "nccl")


@pytest.mark.parametrize(
    ("choice", "text"),
    [
        ("rdma", "'rdma'; it must be one of auto, cuda_ipc, nccl, shm, gloo"),
        (["shm", "auto"], "'auto'; it must be one of"),
        (["shm", "shm"], r"\['shm', 'shm'\]; it must name each transport once"),
        ([], "at least one"),
    ],
)
def test_choices_that_cannot_be_are_refused(choice: str | list[str], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        preference(choice)


def test_the_reason_names_every_transport() -> None:
    assert why_none(
        ["cuda_ipc", "shm", "rdma"],
        ["cuda_ipc", "shm", "gloo"],
        sender_host_id="a",
        receiver_host_id="b",
        failures={"cuda_ipc": "GPU-1 is not visible"},
    ) == (
        "cuda_ipc: GPU-1 is not visible; shm: host a of the sender is not the receiver's b; "
        "gloo: the sender does not offer it; rdma: the receiver does not have it"
    )
    assert why_none([], [], sender_host_id="", receiver_host_id="", failures={}) == "neither side has any"


def test_failures_are_forgotten_after_a_while_and_told_once() -> None:
    failures = TransportFailures(retry_s=10.0)
    assert failures.note("p", "shm", "full", 0.0)
    assert not failures.note("p", "shm", "full again", 1.0)
    assert failures.note("q", "shm", "full", 1.0)
    assert failures.usable("p", ["shm", "gloo"], 10.9) == ("gloo",)
    assert failures.usable("p", ["shm", "gloo"], 11.0) == ("shm", "gloo")
    assert failures.usable("stranger", ["shm", "gloo"], 0.0) == ("shm", "gloo")
    assert failures.reasons("p") == {"shm": "full again"}


def test_failures_are_bounded() -> None:
    failures = TransportFailures()
    for i in range(5000):
        failures.note(f"p{i}", "shm", "", 0.0)
    assert failures.reasons("p0") == {}
    assert failures.reasons("p4999") == {"shm": ""}


def test_transports_of_a_worker(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    missing = {"cuda_ipc": "no GPU", "nccl": "no GPU", "shm": "", "gloo": ""}
    monkeypatch.setattr(select, "available", lambda: dict(missing))

    def names(choice: str | list[str], device: str = "cpu") -> list[str]:
        return [transport.name for transport in make_transports(choice, device=device)]

    assert names("auto") == names("auto", "cuda") == ["shm", "gloo"]
    assert names(["gloo", "shm"]) == ["gloo", "shm"]
    assert caplog.text == "", "auto warns of nothing"
    assert names(["nccl", "gloo"], "cuda") == ["gloo"]
    assert "transports left out: nccl: no GPU" in caplog.text
    with pytest.raises(ConfigError, match="nothing of that works here: nccl: the KV pool is on cpu, not on a GPU"):
        names("nccl")
    missing["shm"] = "full"
    with pytest.raises(ConfigError, match="cuda_ipc: no GPU; shm: full"):
        names(["cuda_ipc", "shm"], "cuda:1")


def test_what_is_available_is_asked_without_loading_torch() -> None:
    assert available().keys() == set(TRANSPORT_NAMES)
    code = "import sys, baton.kv_transfer.transports.select; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class Broken(Transport):
    """Works up to the stage of set-up that is named."""

    def __init__(self, stage: str, name: str = "gloo") -> None:
        self.name = name
        self.stage = stage
        self.num_opened = 0

    def open_send(self, *, peer: str) -> SendSetup:
        if self.stage == "open_send":
            raise HandoverError("this host cannot")
        self.num_opened += 1
        return _BrokenSend(self.stage)

    def open_receive(self, options: Mapping[str, str], *, peer: str) -> ReceiveSetup:
        if self.stage == "open_receive":
            raise HandoverError("cannot be opened here")
        return _BrokenReceive(self.stage)


class _BrokenSend(SendSetup):
    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.options = {}

    def finish(self, options: Mapping[str, str], deadline_s: float) -> SendLink:
        if self.stage == "send_finish":
            raise DeadlineError("nobody came") if deadline_s < 0 else HandoverError("cannot connect back")
        setup = ShmTransport(arena_bytes=ARENA_BYTES).open_send(peer="receiver")
        return setup.finish({}, deadline_s)

    def cancel(self) -> None:
        pass


class _BrokenReceive(ReceiveSetup):
    def __init__(self, stage: str) -> None:
        self.stage = stage
        self.options = {}

    def finish(self, deadline_s: float) -> ReceiveLink:
        raise HandoverError("the receiver's half fails")

    def cancel(self) -> None:
        pass


@pytest.mark.parametrize("stage", ["open_send", "open_receive", "send_finish", "receive_finish"])
async def test_a_transport_that_fails_gives_way_to_the_next(stage: str, caplog: pytest.LogCaptureFixture) -> None:
    broken, working = Broken(stage), ShmTransport(arena_bytes=ARENA_BYTES)
    decode = await DecodeWorker(make_peer("decode-0"), [broken, working], 16).start()
    prefill = PrefillWorker(make_peer("prefill-0"), [broken, working], 16)
    link = await prefill.sender.link(decode.address)
    if stage == "receive_finish":  # the sender learns of it when its own half is up
        await eventually(lambda: link.is_closed)
        assert "takes its welcome back: gloo could not be set up: the receiver's half fails" in link.close_reason
        link = await prefill.sender.link(decode.address)
    await eventually(lambda: decode.receiver.num_links == 1)
    assert not link.is_closed
    assert "transport gloo" in caplog.text

    link.close("the test wants another")
    opened, warnings = broken.num_opened, caplog.text.count("WARNING")
    again = await prefill.sender.link(decode.address)
    assert not again.is_closed
    if stage in ("send_finish", "receive_finish"):
        assert broken.num_opened == opened, "what failed is not offered again"
    if stage != "open_send":
        assert caplog.text.count("WARNING") == warnings, "one warning per peer"
    await prefill.sender.close()
    await decode.stop()


async def test_a_set_up_that_takes_too_long_gives_way_and_is_closed_when_it_comes() -> None:
    come, links = threading.Event(), list[SendLink]()

    class Slow(Broken):
        def open_send(self, *, peer: str) -> SendSetup:
            setup = super().open_send(peer=peer)
            finish = setup.finish

            def finish_late(options: Mapping[str, str], deadline_s: float) -> SendLink:
                come.wait(WAIT_S)
                links.append(finish(options, deadline_s))
                return links[-1]

            setup.finish = finish_late  # type: ignore[method-assign]
            return setup

    slow, working = Slow("receive_finish"), ShmTransport(arena_bytes=ARENA_BYTES)
    decode = await DecodeWorker(make_peer("decode-0"), [slow, working], 16).start()
    prefill = PrefillWorker(make_peer("prefill-0"), [slow, working], 16, connect_timeout_s=3.0)
    link = await prefill.sender.link(decode.address)
    assert not link.is_closed
    come.set()
    await eventually(lambda: len(links) == 1)

    def is_closed() -> bool:
        try:
            links[0].release(links[0].stage(1, 0.0))
        except HandoverError:
            return True
        return False

    await eventually(is_closed)
    await prefill.sender.close()
    await decode.stop()


async def test_a_link_without_any_transport_says_why_for_each() -> None:
    transports = [Broken("send_finish", "nccl"), Broken("send_finish", "gloo")]
    decode = await DecodeWorker(make_peer("decode-0"), transports, 16).start()
    prefill = PrefillWorker(make_peer("prefill-0"), transports, 16)
    with pytest.raises(HandoverError, match="can be set up: nccl: cannot connect back; gloo: cannot connect back"):
        await prefill.sender.link(decode.address)
    with pytest.raises(HandoverError, match="can be set up"):
        await prefill.sender.link(decode.address)
    await prefill.sender.close()
    await decode.stop()


async def test_a_refusal_says_why_for_each_transport() -> None:
    receiving = [Broken("open_receive", "nccl"), Broken("open_receive", "gloo")]
    sending = [Broken("open_send", "cuda_ipc"), Broken("", "nccl"), Broken("", "shm")]
    decode = await DecodeWorker(make_peer("decode-0"), receiving, 16).start()
    prefill = PrefillWorker(make_peer("prefill-0"), sending, 16)
    with pytest.raises(IncompatibleError) as refused:
        await prefill.sender.link(decode.address)
    assert str(refused.value).endswith(
        "nccl: cannot be opened here; shm: the receiver does not have it; gloo: the sender does not offer it; "
        "cuda_ipc is not offered because this host cannot"
    )
    await prefill.sender.close()
    await decode.stop()
