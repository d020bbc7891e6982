"""Deliberate defects, one at a time, that the checkers must catch: who checks the checkers.

Each is a small wrong change of one method of the product, of the kind that a tired programmer makes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from unittest import mock

import baton.router.dispatch as dispatch
from baton.decode_worker.worker import DecodeWorker
from baton.engine.block_journal import BlockJournal
from baton.engine.block_pool import BlockPool
from baton.engine.scheduler import Scheduler
from baton.kv_transfer.handover_receiver import ReceiverHandover, ReceiverState
from baton.kv_transfer.receiver_link import ReceiverLink
from baton.prefill_worker.worker import PrefillWorker
from baton.router.links import DecodeLink
from baton.router.token_queue import TokenQueue
from baton.worker.news import News

__all__ = ["MUTATIONS", "Mutation"]

_Make = Callable[[], contextlib.AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Mutation:
    """A defect.

    Attributes:
        name: for people.
        caught_by: the checkers that may find it.
        make: makes it; the context it returns ends it.
        needs: a kind of fault without which it does no harm.
    """

    name: str
    caught_by: tuple[str, ...]
    make: _Make
    needs: str = ""


def _instead(owner: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]]) -> _Make:
    """A method replaced by what `make` makes of it."""
    return lambda: mock.patch.object(owner, name, make(getattr(owner, name)))


def _repeats(real: Callable[..., Any]) -> Callable[..., Any]:
    def put_token(self: TokenQueue, token_id: int) -> None:
        real(self, token_id)
        if token_id % 8 == 3:
            real(self, token_id)

    return put_token


def _forgets_the_last(real: Callable[..., Any]) -> Callable[..., Any]:
    def remaining(live: Any, *rest: Any) -> Any:
        kept = live.emitted_ids
        live.emitted_ids = kept[:-1]
        try:
            return real(live, *rest)
        finally:
            live.emitted_ids = kept

    return remaining


def _frees_shared(real: Callable[..., Any]) -> Callable[..., Any]:
    def release(self: BlockPool, blocks: Any) -> None:
        for block in blocks:
            if self._references[block] > 1:
                self._references[block] = 1
        real(self, blocks)

    return release


def _loses_some(real: Callable[..., Any]) -> Callable[..., Any]:
    def release(self: BlockPool, blocks: Any) -> None:
        real(self, blocks[:-1] if len(blocks) == 3 else blocks)

    return release


def _names_too_early(real: Callable[..., Any]) -> Callable[..., Any]:
    def name_blocks(self: Scheduler, seq: Any) -> None:
        seq.num_computed += 1
        real(self, seq)
        seq.num_computed -= 1

    return name_blocks


def _settles_early(_: Callable[..., Any]) -> Callable[..., Any]:
    def settle_if_idle(self: ReceiverHandover) -> Any:
        from baton.kv_transfer.handover import Settle

        if self.state is not ReceiverState.ABORTING:
            return ()
        self.state = ReceiverState.SETTLED
        return (Settle(),)

    return settle_if_idle


def _releases_early(_: Callable[..., Any]) -> Callable[..., Any]:
    async def settle(self: Any, key: Any, live: Any) -> None:
        self._live.pop(key, None)
        if not self._live:
            self._idle.set()
        self._command(lambda engine: engine.release(key))
        self.shipments.abort(live.shipment, "the prefill ended")

    return settle


def _tells_nobody(real: Callable[..., Any]) -> Callable[..., Any]:
    def down(self: DecodeLink, reason: str) -> None:
        self._live = {}
        real(self, reason)

    return down


def _tells_no_eviction(real: Callable[..., Any]) -> Callable[..., Any]:
    def toggle(self: BlockJournal, name: bytes, is_stored: bool) -> None:
        if is_stored:
            real(self, name, is_stored)

    return toggle


_EXACT, _PAGES = "the stream is exact", "pages are what was written"
_BLOCKS, _OWNED = "no block is lost, none has two owners", "no block stays owned"
_OWNER, _BOUNDED, _STATE = "single owner", "bounded recovery", "no request without a state"
_STRAY, _INDEX = "no stray exception", "the index follows"

MUTATIONS: tuple[Mutation, ...] = (
    Mutation("a token is told twice", (_EXACT,), _instead(TokenQueue, "put_token", _repeats)),
    Mutation("a resumed request forgets a token", (_EXACT,), _instead(dispatch, "_remaining", _forgets_the_last)),
    Mutation("a shared block is freed", (_BLOCKS, _OWNER, _STRAY), _instead(BlockPool, "release", _frees_shared)),
    Mutation("a block is not given back", (_BLOCKS, _OWNED), _instead(BlockPool, "release", _loses_some)),
    Mutation(
        "a block is cached before it is full",
        (_PAGES, _EXACT, _OWNER, _STRAY),
        _instead(Scheduler, "_name_blocks", _names_too_early),
    ),
    Mutation(
        "no checksum is compared",
        (_PAGES, _EXACT),
        _instead(ReceiverLink, "_verify", lambda _: lambda *_: ""),
        needs="flip",
    ),
    Mutation(
        "a reservation settles while it is written to",
        (_OWNER, _STRAY, _PAGES),
        _instead(ReceiverHandover, "_settle_if_idle", _settles_early),
    ),
    Mutation(
        "a prompt's blocks go back before they are shipped",
        (_OWNER, _STRAY, _EXACT, _PAGES),
        _instead(PrefillWorker, "_settle", _releases_early),
        needs="break_at_message",
    ),
    Mutation(
        "a cancelled request is not released",
        (_OWNED, _BOUNDED, _STATE),
        _instead(DecodeWorker, "_release", lambda _: lambda *_: None),
    ),
    Mutation("a lost stream is not told", (_BOUNDED,), _instead(DecodeLink, "_down", _tells_nobody)),
    Mutation("a claim is not given back", (_STATE,), _instead(dispatch._Claim, "end", lambda _: lambda _: None)),
    Mutation("an eviction is not told", (_INDEX,), _instead(BlockJournal, "toggle", _tells_no_eviction)),
    Mutation("steps and releases are not told", (_INDEX,), _instead(News, "touch", lambda _: lambda _: None)),
    Mutation(
        "a cancel is lost",
        ("a client that left costs nothing more",),
        _instead(DecodeLink, "forget", lambda _: lambda self, key: self._end(key)),
    ),
)
