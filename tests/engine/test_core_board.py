"""Claims of cores, and cores lent and given back, between real processes."""

from __future__ import annotations

import json
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from baton.engine.core_board import CoreClaim, claim_cores
from baton.engine.core_plan import Place
from baton.kernels import ops

HOST = sorted(os.sched_getaffinity(0))[:2]
WORKER = Path(__file__).parent / "core_worker.py"
two_cores = pytest.mark.skipif(len(HOST) < 2 or ops.backend() == "reference", reason="needs two cores and kernels")


class Worker:
    """A process that runs `core_worker.py`."""

    def __init__(self, board: Path, group: int, *arguments: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, str(WORKER), str(board), str(group), json.dumps(HOST), *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.slot = self.answer()["slot"]

    def tell(self, command: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(command + "\n")
        self.process.stdin.flush()

    def ask(self, command: str) -> dict[str, Any]:
        self.tell(command)
        if command.startswith("work"):
            assert self.answer()["began"]
        return self.answer()

    def until_helped(self) -> dict[str, Any]:
        """Works until somebody has helped: not at once, where the machine stands still."""
        until_s = time.monotonic() + 30
        while not (found := self.ask("work 0.3"))["helped"]:
            assert found["right"]
            assert time.monotonic() < until_s, "nobody helps"
        return found

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def end(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        assert self.process.wait(timeout=20) == 0


def beside_one_that_entered(entered: Worker, working: Worker) -> dict[str, Any]:
    """What `working` tells of a while in which `entered` was seen all along: who is not for 2 s counts as dead."""
    until_s = time.monotonic() + 30
    while True:
        begin_s = time.monotonic()
        entered.ask("enter")
        found = working.ask("work 0.2")
        if time.monotonic() - begin_s < 1.9:
            return found
        assert time.monotonic() < until_s, "this machine is too slow for this test"


@contextmanager
def workers(board: Path, *groups: int) -> Iterator[list[Worker]]:
    started = [Worker(board, group) for group in groups]
    try:
        yield started
        for worker in started:
            if worker.process.returncode is None:
                worker.end()
        assert not board.exists(), "the last claim takes the board along"
    finally:
        for worker in started:
            worker.process.kill()
            worker.process.wait(timeout=20)


def test_claims_in_one_process_share_and_give_back(tmp_path: Path) -> None:
    board = tmp_path / "board"
    first = CoreClaim(board, Place(1), [0, 1, 2, 3], {})
    assert first.cores == (0, 1, 2, 3)
    second = CoreClaim(board, Place(0), [0, 1, 2, 3], {})
    assert (second.cores, first.cores) == ((0, 1), (2, 3))
    first.release()
    assert second.cores == (0, 1, 2, 3)
    assert first.cores == ()
    first.release()
    second.release()
    assert not board.exists()


def test_more_claims_than_slots_go_without(tmp_path: Path) -> None:
    claims = [CoreClaim(tmp_path / "board", Place(1, index), [0, 1], {}) for index in range(65)]
    assert [claim.slot for claim in claims] == [*range(64), -1]
    claims[-1].attach()
    for claim in claims:
        claim.release()


def test_a_damaged_board_is_made_anew_and_a_host_without_shared_memory_does_without(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "board").write_bytes(b"\xff" * 100)
    claim = CoreClaim(tmp_path / "board", Place(0), [0], {})
    assert claim.cores == (0,)
    claim.release()
    monkeypatch.setattr("baton.engine.core_board._FOLDER", tmp_path / "missing")
    assert claim_cores("c", Place(0), [0], {}) is None
    assert "no board of cores" in caplog.text


@pytest.mark.skipif(ops.backend() == "reference", reason="needs kernels")
def test_what_is_no_board_is_refused(tmp_path: Path) -> None:
    for name, content in (("short", b"x"), ("other", bytes(1 << 16))):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match="board"):
            ops.attach_cores(str(tmp_path / name), 0, 1)
    with pytest.raises(ValueError, match="cannot open"):
        ops.attach_cores(str(tmp_path / "missing"), 0, 1)


@two_cores
def test_an_idle_workers_core_is_borrowed_and_a_busy_ones_is_not(tmp_path: Path) -> None:
    with workers(tmp_path / "board", 0, 1) as (prefill, decode):
        assert [prefill.ask("cores")["cores"], decode.ask("cores")["cores"]] == [HOST[:1], HOST[1:]]
        alone = decode.until_helped()
        assert alone["right"]
        assert alone["cores"] == HOST[1:], "the compute thread stays on its own core"
        beside = beside_one_that_entered(prefill, decode)
        assert beside["right"]
        assert beside["helped"] == 0
        prefill.ask("leave")
        decode.until_helped()


@two_cores
def test_both_at_work_stay_on_their_own_cores(tmp_path: Path) -> None:
    with workers(tmp_path / "board", 0, 1) as (prefill, decode):
        for seconds in (0.6, 5, 30):
            prefill.tell(f"work {seconds}")
            assert prefill.answer()["began"]
            beside, own = decode.ask("work 0.2"), prefill.answer()
            assert own["right"]
            if beside["ended_s"] < own["ended_s"]:
                break
        assert beside["helped"] == 0


@two_cores
def test_the_cores_of_a_worker_that_hangs_or_dies_are_free_again(tmp_path: Path) -> None:
    with workers(tmp_path / "board", 0, 1) as (prefill, decode):
        assert beside_one_that_entered(prefill, decode)["helped"] == 0
        prefill.process.kill()
        prefill.process.wait(timeout=20)
        time.sleep(2.1)
        decode.until_helped()  # the other has not been seen for 2 s
        newcomer = Worker(tmp_path / "board", 0)
        try:
            assert newcomer.slot == prefill.slot, "its claim has gone with it"
            assert decode.ask("cores")["cores"] == HOST[1:]
            newcomer.end()
        finally:
            newcomer.process.kill()
            newcomer.process.wait(timeout=20)
        assert decode.ask("cores")["cores"] == HOST


@two_cores
def test_a_limit_of_threads_holds_for_borrowed_cores_too(tmp_path: Path) -> None:
    worker = Worker(tmp_path / "board", 0, "1")
    try:
        assert worker.ask("work 0.1")["helped"] == 0
        worker.end()
    finally:
        worker.process.kill()
        worker.process.wait(timeout=20)


def test_a_board_in_use_is_one_at_every_moment(tmp_path: Path) -> None:
    """Who attaches takes no lock: a claim of another process must not make the board look like none meanwhile."""
    board = tmp_path / "board.cores"
    own = CoreClaim(board, Place(group=0), HOST, {0: HOST})
    code = (
        "import json, sys; from pathlib import Path; from baton.engine.core_board import CoreClaim;"
        "from baton.engine.core_plan import Place; hosts = json.loads(sys.argv[2]);"
        "claim = CoreClaim(Path(sys.argv[1]), Place(group=0, index=1), hosts, {0: hosts}); print('go', flush=True);"
        "[claim.cores for _ in range(20_000)]; claim.release()"
    )
    arguments = [sys.executable, "-c", code, str(board), json.dumps(HOST)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as other, board.open("rb") as file:
        assert other.stdout is not None
        assert other.stdout.readline() == "go\n"
        with mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ) as head:
            magic, seen = head[:8], set()
            while other.poll() is None:
                seen.update(head[:8] for _ in range(1000))
    own.release()
    assert seen == {magic}
    assert any(magic)
