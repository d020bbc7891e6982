"""Golden transcripts of both state machines: each event, what was asked for, and the state after it.

Files in `testdata/`: a line is an event, its answer is indented below. Rewrite the answers with
`BATON_REWRITE=1 pytest tests/kv_transfer/test_handover_golden.py` and review the difference.
"""

from __future__ import annotations

import dataclasses
import enum
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from baton.kv_transfer.handover import Completion, Offer, TicketTerms
from baton.kv_transfer.handover_receiver import ReceiverHandover
from baton.kv_transfer.handover_sender import SenderHandover
from baton.kv_transfer.plan import PageRange

FILES = sorted((Path(__file__).parent / "testdata").glob("*.txt"))
NUM_LAYERS, NUM_HEADS, CELL_BYTES = 4, 2, 8
PEERS = {"A": b"A" * 16, "B": b"B" * 16}


def show(value: object) -> str:
    """An action in one line, without what is the same everywhere."""
    if isinstance(value, PageRange):
        return f"[{value}]"
    if isinstance(value, enum.StrEnum):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = [(f.name, v) for f in dataclasses.fields(value) if (v := getattr(value, f.name)) is not False]
        return f"{type(value).__name__}({', '.join(f'{name}={show(v)}' for name, v in fields)})"
    return repr(value)


def pages(words: dict[str, str]) -> PageRange:
    def pair(name: str, default: str) -> tuple[int, int]:
        begin, end = words.get(name, default).split(":")
        return int(begin), int(end)

    return PageRange(*pair("layers", f"0:{NUM_LAYERS}"), *pair("heads", f"0:{NUM_HEADS}"), *pair("tokens", "0:1"))


def terms(words: dict[str, str]) -> TicketTerms:
    return TicketTerms(
        reservation_id=1,
        epoch=int(words.get("epoch", 5)),
        cached_tokens=int(words.get("cached", 0)),
        num_tokens=int(words.get("num_tokens", 32)),
        lease_s=float(words.get("lease", 30)),
    )


def wanted(words: dict[str, str]) -> tuple[PageRange, ...]:
    its = terms(words)
    return (PageRange(0, NUM_LAYERS, 0, NUM_HEADS, its.cached_tokens, its.num_tokens),)


class ReceiverBench:
    """Runs one receiver by text."""

    def __init__(self, words: dict[str, str]) -> None:
        self.now_s = 0.0
        self.machine = ReceiverHandover(terms(words), wanted(words), cell_num_bytes=CELL_BYTES, now_s=0.0)

    def event(self, name: str, words: dict[str, str], text: str) -> object:
        machine, epoch, sender = self.machine, int(words.get("epoch", 5)), PEERS[words.get("from", "A")]
        self.now_s = float(words.get("at", self.now_s))
        handlers: dict[str, Callable[[], object]] = {
            "ticket": lambda: machine.ticket_requested(sender, self.now_s),
            "offer": lambda: machine.offered(self._offer(words), epoch=epoch, sender=sender, now_s=self.now_s),
            "fetched": lambda: machine.fetched(int(words["seq"]), text),
            "complete": lambda: machine.completed(
                Completion(num_offers=int(words["offers"]), first_token=words.get("token", "t")),
                epoch=epoch,
                sender=sender,
                now_s=self.now_s,
            ),
            "sender_abort": lambda: machine.sender_aborted(text, epoch=epoch),
            "renew": lambda: machine.renewed(self.now_s, sender=sender),
            "attached": machine.attached,
            "released": machine.released,
            "cancel": lambda: machine.cancelled(text),
            "link_lost": lambda: machine.link_lost(text),
            "tick": lambda: machine.tick(self.now_s),
        }
        return handlers[name]()

    @staticmethod
    def _offer(words: dict[str, str]) -> Offer:
        box = pages(words)
        num_bytes = int(words.get("bytes", box.num_cells * CELL_BYTES))
        return Offer(
            seq=int(words["seq"]), pages=box, num_bytes=num_bytes, checksum=int(words.get("sum", 0)), locator="x"
        )


class SenderBench:
    """Runs one sender by text."""

    def __init__(self, words: dict[str, str]) -> None:
        self.now_s = 0.0
        self.machine = SenderHandover(
            cell_num_bytes=CELL_BYTES, ticket_timeout_s=float(words.get("timeout", 60)), lease_s=30, now_s=0.0
        )

    def event(self, name: str, words: dict[str, str], text: str) -> object:
        machine = self.machine
        self.now_s = float(words.get("at", self.now_s))
        handlers: dict[str, Callable[[], object]] = {
            "granted": lambda: machine.granted(
                terms(words),
                wanted(words),
                max_payload_bytes=int(words.get("max_payload", 1 << 20)),
                now_s=self.now_s,
            ),
            "refused": lambda: machine.refused(text),
            "computed": lambda: machine.computed(pages(words)),
            "completed": lambda: machine.completed(words.get("token", "t")),
            "posted": lambda: machine.posted(int(words["seq"])),
            "stage_failed": lambda: machine.stage_failed(int(words["seq"]), text),
            "acked": lambda: machine.acked(int(words["seq"]), text, self.now_s),
            "peer_settled": lambda: machine.peer_settled(text),
            "renewed": lambda: machine.renewed(self.now_s),
            "abort": lambda: machine.aborted(text),
            "link_lost": lambda: machine.link_lost(text),
            "tick": lambda: machine.tick(self.now_s),
        }
        return handlers[name]()


def run(transcript: str) -> str:
    """The transcript with its answers computed anew."""
    out: list[str] = []
    bench: ReceiverBench | SenderBench | None = None
    for line in transcript.splitlines():
        if line.startswith("    "):
            continue
        out.append(line)
        if not line or line.startswith("#"):
            continue
        head, _, text = line.partition(" -- ")
        name, *rest = head.split()
        words = dict(word.split("=", 1) for word in rest)
        if name in ("receiver", "sender"):
            bench = ReceiverBench(words) if name == "receiver" else SenderBench(words)
        else:
            assert bench is not None, "a transcript begins with receiver or sender"
            actions = bench.event(name, words, text)
            assert isinstance(actions, tuple)
            out += [f"    {show(action)}" for action in actions]
        out.append(f"    {bench.machine.state} accessors={bench.machine.num_accessors}")
    return "\n".join(out) + "\n"


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_transcript(path: Path) -> None:
    given = path.read_text()
    found = run(given)
    if os.environ.get("BATON_REWRITE"):
        path.write_text(found)
    else:
        assert found == given


def test_there_are_transcripts() -> None:
    assert len(FILES) >= 6
