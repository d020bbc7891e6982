"""One suite that every transport must pass, with the two halves in two processes."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from multiprocessing.connection import Connection
from pathlib import Path

import pytest
import torch
from _pytest.mark import ParameterSet
from transport_peer import FOLDER, SETUP_S, in_one_process, make_transport, payload_of, send_in_process

from baton.errors import ConfigError, DeadlineError, HandoverError
from baton.kv_transfer.transports.base import ReceiveLink, SendLink, Transport
from baton.kv_transfer.transports.faulty import FaultyTransport
from baton.kv_transfer.transports.gloo import GlooTransport
from baton.kv_transfer.transports.select import available, candidates, host_id, make_transports
from baton.kv_transfer.transports.shm import SEGMENT_PREFIX, ShmTransport


def _on_gpu(name: str, num_gpus: int) -> ParameterSet:
    """A transport that needs GPUs. Two processes on one GPU can share memory, but NCCL wants one GPU each."""
    reason = available()[name]
    if not reason and torch.cuda.device_count() < num_gpus:
        reason = f"{torch.cuda.device_count()} GPU, and it needs {num_gpus}"
    return pytest.param(name, marks=pytest.mark.skipif(bool(reason), reason=f"{name}: {reason}"))


# The fakes stand for the GPU and for NCCL itself; everything above them is the real transport.
IN_ONE_PROCESS = ["gloo", "shm", "fake_cuda_ipc", "fake_cuda_ipc_far", "fake_nccl", "faulty_gloo", "faulty_shm"]
NAMES = [*IN_ONE_PROCESS, _on_gpu("cuda_ipc", 1), _on_gpu("nccl", 2)]
OUTLIVES_ITS_WRITER = ("shm", "fake_cuda_ipc", "fake_cuda_ipc_far")
DEADLINE_S = 20.0
Connect = Callable[..., "Link"]


class Link:
    """A sender in another process, and the receiving half here."""

    def __init__(self, transport: Transport, arena_bytes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch.distributed"])
        self.pipe: Connection
        self.pipe, theirs = context.Pipe()
        name = f"faulty_{transport.name}" if isinstance(transport, FaultyTransport) else transport.name
        self.process = context.Process(target=send_in_process, args=(theirs, name, arena_bytes, FOLDER), daemon=True)
        self.process.start()
        theirs.close()
        setup = transport.open_receive(self.pipe.recv(), peer="sender")
        self.pipe.send(setup.options)
        self.receive: ReceiveLink = setup.finish(SETUP_S)
        assert self.ask() == "up"

    def ask(self, *command: object) -> object:
        if command:
            self.pipe.send(command)
        assert self.pipe.poll(DEADLINE_S), "the sending process does not answer"
        return self.pipe.recv()

    def post(self, num_bytes: int, seed: int, deadline_s: float = DEADLINE_S) -> str:
        locator = self.ask("post", num_bytes, seed, deadline_s)
        if isinstance(locator, Exception):
            raise locator
        assert isinstance(locator, str)
        return locator

    def expect(self, locator: str, num_bytes: int, seed: int) -> None:
        payload = self.receive.fetch(locator, num_bytes, DEADLINE_S)
        assert payload.dtype == torch.uint8
        assert payload.shape == (num_bytes,)
        assert payload.is_contiguous()
        with self.receive.reading():
            arrived = payload.cpu()
        assert torch.equal(arrived, payload_of(num_bytes, seed))
        self.receive.done(payload)

    def close(self) -> None:
        self.receive.close()
        self.pipe.close()
        if self.process.is_alive():
            self.process.join(0.5)
            self.process.kill()
        self.process.join(DEADLINE_S)


@pytest.fixture(scope="module", autouse=True)
def segments() -> Iterator[None]:
    """The folder of shared memory of these tests is empty again in the end."""
    FOLDER.mkdir()
    yield
    FOLDER.rmdir()


@pytest.fixture(scope="module", params=NAMES)
def transport(request: pytest.FixtureRequest) -> Iterator[Transport]:
    made = make_transport(request.param, 1 << 20)
    yield made
    made.close()


@pytest.fixture(scope="module")
def shared(transport: Transport) -> Iterator[Link]:
    """One link for the tests that leave it whole."""
    link = Link(transport, 80 << 20)
    yield link
    link.close()


@pytest.fixture
def connect(transport: Transport) -> Iterator[Connect]:
    with ExitStack() as stack:

        def make(arena_bytes: int = 1 << 20) -> Link:
            link = Link(transport, arena_bytes)
            stack.callback(link.close)
            return link

        yield make
    assert list(FOLDER.iterdir()) == []


@pytest.mark.parametrize("num_bytes", [1, 63, 65_537, 4 << 20, 64 << 20])
def test_payloads_arrive_as_they_were(shared: Link, num_bytes: int) -> None:
    locator = shared.post(num_bytes, num_bytes)
    shared.expect(locator, num_bytes, num_bytes)


def test_many_in_flight_are_fetched_in_any_order_by_several_threads(connect: Connect) -> None:
    link = connect()
    posted = [(link.post(1000 + seed, seed), 1000 + seed, seed) for seed in range(40)]
    errors: list[BaseException] = []

    def fetch(mine: list[tuple[str, int, int]]) -> None:
        try:
            for locator, num_bytes, seed in mine:
                link.expect(locator, num_bytes, seed)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=fetch, args=(posted[::-1][i::2],)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(DEADLINE_S)
    assert errors == []


def test_a_full_arena_waits_and_then_says_who_does_not_fetch(connect: Connect) -> None:
    link = connect(4096)
    first, second = link.post(2048, 1), link.post(2048, 2)
    with pytest.raises(DeadlineError, match=r"2048 bytes for receiver: no room within 0\.05 s"):
        link.post(2048, 3, 0.05)
    link.expect(first, 2048, 1)
    assert link.ask("release", 0) == 2048
    third = link.post(2048, 3)
    link.expect(third, 2048, 3)
    link.expect(second, 2048, 2)
    assert link.ask("release", 1) == 2048
    assert link.ask("release", 2) == 0
    with pytest.raises(HandoverError, match="exceeds the staging arena"):
        link.post(5000, 4)


def test_discarded_payloads_let_the_next_ones_through(connect: Connect) -> None:
    link = connect()
    unwanted = link.post(300_000, 1)
    wanted = link.post(300_000, 2)
    link.receive.discard(unwanted, 300_000, DEADLINE_S)
    link.expect(wanted, 300_000, 2)


@pytest.mark.parametrize("locator", ["", "-1", "x", "../../etc/passwd", "1e3", "٣", "9" * 30, "00", " 1"])
def test_damaged_locators_are_refused(shared: Link, locator: str) -> None:
    with pytest.raises(HandoverError):
        shared.receive.fetch(locator, 16, 0.2)
    shared.expect(shared.post(100, 5), 100, 5)


@pytest.mark.parametrize("num_bytes", [0, -1])
def test_sizes_that_cannot_be_are_refused(shared: Link, num_bytes: int) -> None:
    with pytest.raises(HandoverError):
        shared.receive.fetch("0", num_bytes, 0.2)


def test_a_killed_sender_leaves_other_links_alone(connect: Connect, transport: Transport) -> None:
    dying, living = connect(), connect()
    locator = dying.post(1000, 1)
    dying.process.kill()
    dying.process.join(DEADLINE_S)
    started_s = time.monotonic()
    if transport.name in OUTLIVES_ITS_WRITER:
        dying.expect(locator, 1000, 1)  # shared memory outlives its writer
    elif transport.name == "cuda_ipc":
        # CUDA leaves open whether a mapping outlives the process that exported it: what comes is right, or nothing.
        with contextlib.suppress(HandoverError):
            dying.expect(locator, 1000, 1)
    else:
        with pytest.raises(HandoverError):
            dying.receive.fetch(locator, 1000, DEADLINE_S)
    assert time.monotonic() - started_s < DEADLINE_S / 2, "known at once, not at the deadline"
    living.expect(living.post(1000, 2), 1000, 2)


def test_closed_halves_refuse(connect: Connect) -> None:
    link = connect()
    locator = link.post(100, 1)
    link.receive.close()
    link.receive.close()
    with pytest.raises(HandoverError, match="closed"):
        link.receive.fetch(locator, 100, 1.0)
    assert link.ask("close") == "closed"


def test_nothing_stays_in_shared_memory_when_the_sender_is_killed() -> None:
    transport = ShmTransport(folder=FOLDER)
    link = Link(transport, 1 << 20)
    assert list(FOLDER.iterdir()) == [], "the name is gone while the link lives"
    link.process.kill()
    link.close()


def test_a_sender_that_stands_still_is_given_up_at_the_deadline() -> None:
    transport = GlooTransport()
    link = Link(transport, 1 << 20)
    locator = link.post(500_000, 1)
    assert link.process.pid is not None
    os.kill(link.process.pid, signal.SIGSTOP)
    end_s = time.monotonic() + DEADLINE_S
    while not all_threads_stand(link.process.pid):
        assert time.monotonic() < end_s
        time.sleep(0.005)
    try:
        with pytest.raises(DeadlineError, match=r"sender did not deliver 500000 bytes within 0\.3 s"):
            link.receive.fetch(locator, 500_000, 0.3)
        with pytest.raises(HandoverError, match="broken"):
            link.receive.fetch(locator, 500_000, 0.3)
    finally:
        os.kill(link.process.pid, signal.SIGCONT)
    link.close()
    transport.close()


def all_threads_stand(pid: int) -> bool:
    states = [(task / "stat").read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").iterdir()]
    return set(states) == {"T"}


@pytest.mark.parametrize("name", IN_ONE_PROCESS)
def test_close_wakes_who_waits_for_room_and_frees_threads(name: str) -> None:
    tasks = Path("/proc/self/task")
    # What torch starts once per process is not a link's.
    transport = make_transport(name, 4096)
    for link in in_one_process(transport):
        link.close()
    transport.close()
    del link
    num_threads = len(list(tasks.iterdir()))

    transport = make_transport(name, 4096)
    send, receive = in_one_process(transport)
    staged = send.stage(4096, 1.0)
    errors: list[BaseException] = []

    def wait(send: SendLink) -> None:
        try:
            send.stage(1, DEADLINE_S)
        except HandoverError as error:
            errors.append(error)

    thread = threading.Thread(target=wait, args=(send,))
    thread.start()
    send.close()
    thread.join(DEADLINE_S)
    assert "closed" in str(errors[0])
    staged.payload.fill_(1)  # still mapped: the gather that runs must not fault
    send.release(staged)
    receive.close()
    transport.close()
    del send, receive, staged, thread
    errors.clear()  # their tracebacks hold the link
    end_s = time.monotonic() + DEADLINE_S
    while len(list(tasks.iterdir())) > num_threads and time.monotonic() < end_s:
        time.sleep(0.01)
    assert len(list(tasks.iterdir())) <= num_threads


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"shm.name": "../../etc/passwd", "shm.bytes": "10"},
        {"shm.name": f"{SEGMENT_PREFIX}../passwd", "shm.bytes": "10"},
        {"shm.name": f"{SEGMENT_PREFIX}{'0' * 32}", "shm.bytes": "10"},
        {"shm.name": f"{SEGMENT_PREFIX}{'0' * 32}\n", "shm.bytes": "10"},
        {"shm.name": f"{SEGMENT_PREFIX}{'0' * 32}", "shm.bytes": str(1 << 50)},
        {"shm.name": f"{SEGMENT_PREFIX}{'0' * 32}", "shm.bytes": "-1"},
    ],
    ids=["none", "path", "prefixed-path", "absent", "newline", "huge", "negative"],
)
def test_shm_trusts_no_name_and_no_size(options: dict[str, str]) -> None:
    with pytest.raises(HandoverError):
        ShmTransport().open_receive(options, peer="sender")


def test_shm_refuses_a_file_of_another_size_and_a_link(tmp_path: Path) -> None:
    name = SEGMENT_PREFIX + "0" * 32
    (tmp_path / name).write_bytes(bytes(100))
    with pytest.raises(HandoverError, match="not a file of ours of 200 bytes"):
        ShmTransport(folder=tmp_path).open_receive({"shm.name": name, "shm.bytes": "200"}, peer="sender")
    (tmp_path / name).rename(tmp_path / "elsewhere")
    (tmp_path / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HandoverError, match="cannot be opened"):
        ShmTransport(folder=tmp_path).open_receive({"shm.name": name, "shm.bytes": "100"}, peer="sender")


def test_shm_says_what_to_do_when_there_is_no_memory(tmp_path: Path) -> None:
    with pytest.raises(HandoverError, match="use transport gloo"):
        ShmTransport(folder=tmp_path / "absent").open_send(peer="receiver")


@pytest.mark.parametrize("store", ["", "nowhere", "127.0.0.1:", "127.0.0.1:1"])
def test_gloo_gives_up_on_a_store_that_is_not_there(store: str) -> None:
    setup = GlooTransport(arena_bytes=4096).open_send(peer="receiver")
    with pytest.raises(HandoverError):
        setup.finish({"gloo.store": store, "gloo.prefix": "link/x"}, 0.5)


def test_gloo_listens_on_the_given_host_only() -> None:
    transport = GlooTransport()
    options = transport.open_receive({}, peer="sender").options
    port = int(options["gloo.store"].rpartition(":")[2])
    listening = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert f"0100007F:{port:04X}" in listening
    assert not any(line.endswith(f":{port:04X}") and not line.startswith("0100007F") for line in listening)
    tcp6 = [line.split()[1] for line in Path("/proc/net/tcp6").read_text().splitlines()[1:] if " 0A " in line]
    assert not any(line.endswith(f":{port:04X}") for line in tcp6)
    transport.close()


@pytest.mark.parametrize(
    ("offered", "available", "same_host", "expected"),
    [
        (["shm", "gloo"], ["shm", "gloo"], True, ("shm", "gloo")),
        (["shm", "gloo"], ["shm", "gloo"], False, ("gloo",)),
        (["gloo", "shm"], ["shm", "gloo"], True, ("gloo", "shm")),
        (["shm"], ["shm", "gloo"], False, ()),
        (["nccl", "gloo"], ["gloo"], True, ("gloo",)),
        ([], ["gloo"], True, ()),
    ],
)
def test_candidates(offered: list[str], available: list[str], same_host: bool, expected: tuple[str, ...]) -> None:
    receiver_host_id = "a" if same_host else "b"
    assert candidates(offered, available, sender_host_id="a", receiver_host_id=receiver_host_id) == expected


def test_unknown_hosts_are_not_the_same_host() -> None:
    assert candidates(["shm"], ["shm"], sender_host_id="", receiver_host_id="") == ()
    assert host_id() == host_id() != ""


def test_transports_by_configuration() -> None:
    assert [transport.name for transport in make_transports("auto")] == ["shm", "gloo"]
    assert [transport.name for transport in make_transports("gloo")] == ["gloo"]
    with pytest.raises(ConfigError, match="'rdma'; it must be one of auto, cuda_ipc, nccl, shm, gloo"):
        make_transports("rdma")
