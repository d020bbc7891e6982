"""What `cuda_ipc` and `nccl` do when something is wrong, and how they call CUDA and NCCL; on fakes of both."""

from __future__ import annotations

import ctypes
import os
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeCudaIpc, FakeDevice, FakeGroup, FakeNccl, FakeRuntime, make_fake_group

from baton.errors import DeadlineError, HandoverError
from baton.kv_transfer.transports import cuda_device, nccl_group, nccl_links
from baton.kv_transfer.transports.base import ReceiveLink, SendLink, Transport
from baton.kv_transfer.transports.communicators import Communicators
from baton.kv_transfer.transports.cuda_device import CudaDevice, has_ended
from baton.kv_transfer.transports.select import available

WAIT_S = 20.0
ARENA_BYTES = 1 << 16
HANDLE = "00" * 64


def until(condition: Callable[[], bool]) -> None:
    end_s = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def connect(transport: Transport) -> tuple[SendLink, ReceiveLink]:
    setup = transport.open_send(peer="receiver")
    answer = transport.open_receive(setup.options, peer="sender")
    links: list[ReceiveLink] = []
    thread = threading.Thread(target=lambda: links.append(answer.finish(WAIT_S)))
    thread.start()
    send = setup.finish(answer.options, WAIT_S)
    thread.join(WAIT_S)
    return send, links[0]


def post(send: SendLink, content: bytes) -> str:
    staged = send.stage(len(content), WAIT_S)
    with send.filling():
        staged.payload.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8))
    return send.post(staged)


# -------------------------------------------------------------------- the device


def runtime(device: CudaDevice) -> FakeRuntime:
    made = device._library
    assert isinstance(made, FakeRuntime)
    return made


def test_exported_memory_goes_back_after_its_last_tensor_and_a_grace_period(monkeypatch: pytest.MonkeyPatch) -> None:
    device = FakeDevice()
    memory = device.export_memory(1000)
    tensor = memory.tensor()
    assert tensor.shape == (1000,)
    assert os.fstat(runtime(device).files[tensor.data_ptr()]).st_size == 2 << 20, "whole granules are exported"
    del memory
    device.export_memory(1000)
    assert len(runtime(device).maps) == 2, "a tensor keeps its memory"
    del tensor
    device.export_memory(1000)
    assert len(runtime(device).maps) == 3, "a peer may not have let go yet"
    monkeypatch.setattr(cuda_device, "_GRACE_S", -1.0)
    device._retired = [(0.0, pointer) for _, pointer in device._retired]
    device.export_memory(1000)
    assert len(runtime(device).maps) == 1


def test_what_the_runtime_refuses_is_told_in_its_words() -> None:
    device = FakeDevice()
    runtime(device).failing = {"cudaIpcGetMemHandle"}
    with pytest.raises(HandoverError, match=r"cudaIpcGetMemHandle on GPU 0 failed: invalid argument \(1\)"):
        device.export_memory(1000)
    assert runtime(device).maps == {}, "memory that cannot be exported is freed"
    with pytest.raises(HandoverError, match="cudaIpcOpenMemHandle on GPU 0 failed"):
        device.import_memory(bytes(64))


def test_the_threads_gpu_is_put_back() -> None:
    device = FakeDevice()
    device.index = 3
    runtime(device).current = ctypes.c_int(1)
    device.export_memory(1000)
    assert runtime(device).current.value == 1


def test_work_on_a_links_stream_comes_after_the_engines_and_has_ended() -> None:
    device = FakeDevice()
    stream = device.new_stream()

    def work() -> None:
        with device.working_on(stream):
            stream.calls.append("work")
            raise KeyError

    with pytest.raises(KeyError):
        work()
    assert stream.calls == ["wait", "work", "synchronize"]


def test_waiting_for_an_event_ends_at_the_deadline() -> None:
    assert has_ended(SimpleNamespace(query=lambda: True), 0.0)
    started_s = time.monotonic()
    assert not has_ended(SimpleNamespace(query=lambda: False), started_s + 0.02)
    assert time.monotonic() - started_s >= 0.02


def test_no_gpu_is_a_readable_error() -> None:
    if not available()["cuda_ipc"]:
        assert CudaDevice.of("cuda").uuid
        return
    with pytest.raises(HandoverError, match="no GPU here"):
        CudaDevice(0)


# -------------------------------------------------------------------- cuda_ipc


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"cuda_ipc.handle": "../x"}, "memory handle '../x' that is not 64 bytes in hex"),
        ({"cuda_ipc.handle": HANDLE + "\n"}, "not 64 bytes"),
        ({"cuda_ipc.handle": HANDLE.replace("0", "A")}, "not 64 bytes"),
        ({"cuda_ipc.bytes": "0"}, "arena of '0' bytes"),
        ({"cuda_ipc.bytes": str(1 << 50)}, "the limit is"),
        ({"cuda_ipc.gpu": "elsewhere"}, "GPU 'elsewhere' of sender is not visible here.*CUDA_VISIBLE_DEVICES"),
        ({"cuda_ipc.handle": HANDLE}, "cudaIpcOpenMemHandle on GPU 0 failed"),
    ],
)
def test_cuda_ipc_trusts_no_option(changed: Mapping[str, str], text: str) -> None:
    transport = FakeCudaIpc(arena_bytes=ARENA_BYTES)
    options = transport.open_send(peer="receiver").options
    with pytest.raises(HandoverError, match=text):
        transport.open_receive({**options, **changed}, peer="sender")


def test_cuda_ipc_refuses_a_gpu_out_of_reach() -> None:
    device = FakeDevice()
    device.visible, device.reachable = 1, False
    transport = FakeCudaIpc(arena_bytes=ARENA_BYTES, device=device)
    with pytest.raises(HandoverError, match="GPU 0 cannot reach the memory of GPU 1, which sender uses"):
        transport.open_receive(transport.open_send(peer="receiver").options, peer="sender")


def test_a_copy_that_does_not_end_breaks_the_link_and_keeps_its_memory() -> None:
    device = FakeDevice()
    device.visible = 1
    send, receive = connect(FakeCudaIpc(arena_bytes=ARENA_BYTES, device=device))
    locator = post(send, b"x" * 100)
    with pytest.raises(HandoverError, match="outside of its arena of 65536 bytes"):
        receive.fetch(str(ARENA_BYTES - 99), 100, WAIT_S)
    device.hangs = True
    with pytest.raises(DeadlineError, match=r"copying 100 bytes from sender did not end within 0\.02 s"):
        receive.fetch(locator, 100, 0.02)
    with pytest.raises(HandoverError, match="broken: a copy did not end"):
        receive.fetch(locator, 100, 0.02)
    receive.close()
    del receive
    assert len(runtime(device).maps) == 2, "still mapped: the copy may go on"


def test_on_one_gpu_a_payload_is_read_where_it_lies_and_stays_mapped_while_it_is_read() -> None:
    device = FakeDevice()
    send, receive = connect(FakeCudaIpc(arena_bytes=ARENA_BYTES, device=device))
    post(send, b"y" * 64)
    payload = receive.fetch(post(send, b"x" * 100), 100, WAIT_S)
    assert bytes(payload.tolist()) == b"x" * 100
    assert payload.data_ptr() in {pointer + 64 for pointer in runtime(device).maps}, "no copy"
    receive.close()
    del receive
    assert len(runtime(device).maps) == 2, "a payload keeps the memory mapped"
    del payload
    assert len(runtime(device).maps) == 1


def test_pieces_are_longer_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    send, _ = connect(FakeCudaIpc(arena_bytes=1 << 30))
    assert send.max_payload_bytes == 4 << 20, "fake GPUs are CPUs"
    monkeypatch.setattr(send, "_is_on_cpu", False)
    assert send.max_payload_bytes == 64 << 20


# -------------------------------------------------------------------- nccl


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"nccl.gpu": ""}, "NCCL needs two"),
        ({"nccl.version": "2.18.1"}, r"sender has NCCL '2\.18\.1', here it is 2\.27\.3"),
        ({"nccl.bytes": "-1"}, "arena of '-1' bytes"),
    ],
)
def test_nccl_refuses_what_cannot_work(changed: Mapping[str, str], text: str) -> None:
    transport = FakeNccl(arena_bytes=ARENA_BYTES)
    options = transport.open_send(peer="receiver").options
    with pytest.raises(HandoverError, match=text):
        transport.open_receive({**options, **changed}, peer="sender")


def test_nccl_refuses_two_ranks_on_one_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDevice, "uuid", "GPU-1")
    transport = FakeNccl(arena_bytes=ARENA_BYTES)
    with pytest.raises(HandoverError, match="sender is on the same GPU 'GPU-1'"):
        transport.open_receive(transport.open_send(peer="receiver").options, peer="sender")


@pytest.mark.parametrize(
    "locator", ["0", "0:", "1:1,", "1:0", "1:,", "1:99999999999", "1:65537", "x:1", "2:1:1", "-1:", "0: ", "0:\n"]
)
def test_nccl_trusts_no_locator(locator: str) -> None:
    transport = FakeNccl(arena_bytes=ARENA_BYTES)
    send, receive = connect(transport)
    if locator == "0:":
        receive.close()
    with pytest.raises(HandoverError):
        receive.fetch(locator, 8, 0.05)
    for link in (send, receive):
        link.close()
    transport.close()


def test_locators_tell_the_sizes_that_may_not_have_arrived() -> None:
    transport = FakeNccl(arena_bytes=ARENA_BYTES)
    send, receive = connect(transport)
    staged = [send.stage(size, WAIT_S) for size in (10, 20, 30, 40)]
    assert [send.post(buffer) for buffer in staged[:3]] == ["0:", "1:10", "2:10,20"]
    receive.done(receive.fetch("1:10", 20, WAIT_S))
    send.release(staged[1])
    assert send.post(staged[3]) == "3:30", "what came before an acknowledged post has arrived as well"
    assert receive.fetch("0:", 10, WAIT_S).numel() == 10
    with pytest.raises(HandoverError, match="no such post"):
        receive.fetch("0:", 10, WAIT_S)
    assert receive.fetch("3:30", 40, WAIT_S).numel() == 40
    send.release(staged[0])
    send.release(staged[2])
    for link in (send, receive):
        link.close()
    transport.close()


def test_a_fetch_waits_for_those_before_it_when_their_sizes_are_not_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl_links, "_MAX_LISTED", 1)
    transport = FakeNccl(arena_bytes=ARENA_BYTES)
    send, receive = connect(transport)
    locators = [post(send, bytes([i]) * 8) for i in range(3)]
    assert locators == ["0:", "1:8", "2:8"]
    found: list[torch.Tensor] = []
    thread = threading.Thread(target=lambda: found.append(receive.fetch(locators[2], 8, WAIT_S)))
    thread.start()
    assert receive.fetch(locators[0], 8, WAIT_S).tolist() == [0] * 8
    thread.join(WAIT_S)
    assert found[0].tolist() == [2] * 8
    assert receive.fetch(locators[1], 8, WAIT_S).tolist() == [1] * 8
    for link in (send, receive):
        link.close()
    transport.close()


def test_a_deadline_breaks_the_link_and_an_abort_that_hangs_is_counted_and_kept() -> None:
    hang = threading.Event()
    groups: list[FakeGroup] = []

    def make_group(device: CudaDevice, store: Any, rank: int) -> FakeGroup:
        group = make_fake_group(device, store, rank)
        group.hang = hang
        groups.append(group)
        return group

    transport = FakeNccl(arena_bytes=ARENA_BYTES, make_group=make_group, max_open=2)
    send, receive = connect(transport)
    started_s = time.monotonic()
    with pytest.raises(DeadlineError, match=r"sender did not deliver 8 bytes within 0\.02 s"):
        receive.fetch("0:", 8, 0.02)
    with pytest.raises(HandoverError, match="broken"):
        receive.fetch("0:", 8, 0.02)
    receive.close()
    send.close()
    send.close()
    assert time.monotonic() - started_s < WAIT_S / 2, "nobody waits for an abort"
    until(lambda: transport.communicators.num_leaked == 2)
    assert [group.num_aborts for group in groups] == [1, 1]
    with pytest.raises(HandoverError, match="2 are open, which is the limit, 2 of them hang"):
        transport.open_send(peer="receiver")
    kept = [keep for entry in transport.communicators._open for keep in entry.keeps]
    assert len(kept) == 2, "the sender's arena, and the buffer of the receive that hangs"
    hang.set()
    until(lambda: transport.communicators.num_open == 0)
    transport.close()


def test_a_failed_group_breaks_the_link() -> None:
    groups: list[FakeGroup] = []

    def make_group(device: CudaDevice, store: Any, rank: int) -> FakeGroup:
        groups.append(make_fake_group(device, store, rank))
        return groups[-1]

    transport = FakeNccl(arena_bytes=ARENA_BYTES, make_group=make_group)
    send, receive = connect(transport)
    locator = post(send, b"12345678")
    for group in groups:
        group.error = "REMOTE_ERROR"
    with pytest.raises(HandoverError, match="receiving from sender failed: NCCL reports REMOTE_ERROR"):
        receive.fetch(locator, 8, WAIT_S)
    with pytest.raises(HandoverError, match="broken"):
        receive.fetch(locator, 8, WAIT_S)
    send.close()
    until(lambda: transport.communicators.num_open == 0)
    with pytest.raises(HandoverError, match="closed"):
        post(send, b"1")
    transport.close()


@pytest.mark.parametrize("store", ["", "nowhere", "127.0.0.1:", "127.0.0.1:1"])
def test_nccl_gives_up_on_a_store_that_is_not_there(store: str) -> None:
    transport = FakeNccl(arena_bytes=ARENA_BYTES)
    setup = transport.open_send(peer="receiver")
    with pytest.raises((HandoverError, DeadlineError)):
        setup.finish({"nccl.store": store, "nccl.prefix": "link/x"}, 0.3)
    until(lambda: transport.communicators.num_open == 0)


def test_how_a_group_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCH_NCCL_ENABLE_MONITORING", raising=False)
    monkeypatch.setenv("TORCH_NCCL_ASYNC_ERROR_HANDLING", "3")
    calls: list[Any] = []

    class Options:
        def __init__(self) -> None:
            self.config = SimpleNamespace()

    class Group:
        def __init__(self, store: str, rank: int, size: int, options: Options) -> None:
            environment = [os.environ["TORCH_NCCL_ENABLE_MONITORING"], os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"]]
            calls.append((store, rank, size, vars(options.config), options.is_high_priority_stream, environment))  # type: ignore[attr-defined]
            assert options._timeout >= timedelta(hours=1)  # type: ignore[attr-defined]

        def eager_connect_single_device(self, device: torch.device) -> None:
            calls.append(device)

    Group.Options = Options  # type: ignore[attr-defined]
    monkeypatch.setattr(nccl_group, "_dist", SimpleNamespace(ProcessGroupNCCL=Group))
    device = SimpleNamespace(torch_device=torch.device("cuda", 1))
    nccl_group.make_nccl_group(device, "store", 1)  # type: ignore[arg-type]
    config = {"blocking": 0, "min_ctas": 1, "max_ctas": 4}
    assert calls == [("store", 1, 2, config, False, ["0", "0"]), torch.device("cuda:1")]
    assert "TORCH_NCCL_ENABLE_MONITORING" not in os.environ
    assert os.environ["TORCH_NCCL_ASYNC_ERROR_HANDLING"] == "3"


# -------------------------------------------------------------------- communicators


class Group:
    def __init__(self) -> None:
        self.num_aborts = 0

    def abort(self) -> None:
        self.num_aborts += 1


def works(group: object) -> None:
    pass


def test_communicators_are_made_one_after_the_other_and_apart() -> None:
    communicators = Communicators(spacing_s=0.03)
    starts: list[float] = []
    busy: list[int] = []
    lock = threading.Lock()

    def make() -> Group:
        starts.append(time.monotonic())
        assert lock.acquire(blocking=False), "two at a time"
        time.sleep(0.01)
        lock.release()
        busy.append(1)
        return Group()

    threads = [
        threading.Thread(target=lambda: communicators.create(make, works, peer="p", rank=0, deadline_s=WAIT_S))
        for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
    assert len(busy) == 4
    # Starting a thread takes its time, which may bring two starts closer to each other, never the turns.
    assert starts[-1] - starts[0] > 2 * 0.03
    assert communicators.num_open == 4
    assert communicators.num_leaked == 0


def test_a_creation_that_hangs_holds_nobody_up_and_is_ended_when_it_comes() -> None:
    communicators = Communicators(spacing_s=0.0, patience_s=0.05)
    come, late = threading.Event(), Group()

    def make() -> Group:
        come.wait(WAIT_S)
        return late

    with pytest.raises(DeadlineError, match=r"no communicator with slow within 0\.02 s"):
        communicators.create(make, works, peer="slow", rank=0, deadline_s=0.02)
    assert (communicators.num_open, communicators.num_leaked) == (1, 1)
    assert communicators.create(Group, works, peer="fast", rank=0, deadline_s=WAIT_S).peer == "fast"
    come.set()
    until(lambda: late.num_aborts == 1)
    until(lambda: (communicators.num_open, communicators.num_leaked) == (1, 0))


def test_patience_with_another_creation_is_limited() -> None:
    communicators = Communicators(spacing_s=0.0, patience_s=0.02)
    come = threading.Event()

    def make() -> Group:
        come.wait(WAIT_S)
        return Group()

    thread = threading.Thread(target=lambda: communicators.create(make, works, peer="slow", rank=0, deadline_s=WAIT_S))
    thread.start()
    until(lambda: communicators.num_open == 1)
    communicators.create(Group, works, peer="fast", rank=0, deadline_s=WAIT_S)
    come.set()
    thread.join(WAIT_S)
    assert communicators.num_open == 2


def test_the_two_halves_of_a_link_in_one_process_meet() -> None:
    communicators = Communicators(patience_s=WAIT_S)
    meeting = threading.Barrier(2)

    def make() -> Group:
        meeting.wait(WAIT_S)
        return Group()

    thread = threading.Thread(target=lambda: communicators.create(make, works, peer="p", rank=1, deadline_s=WAIT_S))
    thread.start()
    communicators.create(make, works, peer="p", rank=0, deadline_s=WAIT_S)
    thread.join(WAIT_S)
    assert communicators.num_open == 2


def test_a_group_that_does_not_work_is_aborted() -> None:
    communicators = Communicators(spacing_s=0.0)
    group = Group()

    def fails(_: object) -> None:
        raise RuntimeError("NCCL error: unhandled system error\nmore")

    with pytest.raises(HandoverError, match=r"no communicator with p: NCCL error: unhandled system error$"):
        communicators.create(lambda: group, fails, peer="p", rank=0, deadline_s=WAIT_S)
    until(lambda: communicators.num_open == 0)
    assert group.num_aborts == 1
    with pytest.raises(HandoverError, match="no communicator with p: out of memory"):
        communicators.create(lambda: fails_to_make(), works, peer="p", rank=0, deadline_s=WAIT_S)
    assert communicators.num_open == 0


def fails_to_make() -> Group:
    raise RuntimeError("out of memory")


def test_ending_is_idempotent_and_outlives_errors() -> None:
    communicators = Communicators(spacing_s=0.0)

    class Stubborn(Group):
        def abort(self) -> None:
            super().abort()
            raise RuntimeError("already aborted")

    group = Stubborn()
    entry = communicators.create(lambda: group, works, peer="p", rank=0, deadline_s=WAIT_S)
    communicators.end(entry, "arena")
    communicators.end(entry, "arena")
    until(lambda: communicators.num_open == 0)
    assert group.num_aborts == 1
    assert entry.keeps == []
