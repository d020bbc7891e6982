"""Whether the workers have room for one more request now: pure.

    slots    each decode worker's batch holds so many requests
    memory   at its peak, what runs there and is expected to be written fits: a request that ends frees its tokens
             before those that end later have written theirs
    prompts  little more waits to be read than keeps the workers busy, so that who is next is decided here, by shares
             and deadlines, and not by the order in which workers happened to be given work

What this router has let in counts before a worker reports it. A worker that reports no memory is judged by its slots.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum

from baton.router.routing.facts import InstanceView

__all__ = ["Capacity", "Demand", "Held", "Room", "peak_tokens"]

_FULL_SHARE = 0.97
"""Part of KV memory that may be counted on: pages in flight and the last blocks of requests take some."""
_SURELY_SHARE = 0.75
"""Where all that was let in would fit into this part of one worker's memory, nobody need look closer."""
_MIN_PROMPTS = 2
"""One that is read and one to go on with, however long they are."""
_BEYOND_SHARE = 1 / 3
"""Of the prompts that may wait to be read, what a tenant may fill who has more than his share."""
_SLOTS_PER_SPARE = 16
"""For so many slots one request more is sent, to take the place of the next that ends before its end is reported."""
_MOST_OF_SLOTS = 4
"""A request of many answers need not find more than this part of all slots free: workers queue what is left."""


class Room(Enum):
    """Whether there is any."""

    OPEN = "open"
    SLOTS = "slots"
    MEMORY = "memory"
    PROMPTS = "prompts"
    NO_WORKER = "no worker"
    SHARE = "share"
    """There is, but not for this tenant: see `slot_shares.py`."""


@dataclass(frozen=True, slots=True)
class Demand:
    """What a request wants: `choices` answers, each of `prompt_tokens` and `output_tokens` as expected."""

    choices: int
    prompt_tokens: int
    output_tokens: int


@dataclass(frozen=True, slots=True)
class Held:
    """A choice that was let in: on which decode worker ("" while it is on its way), and what it has and will have.

    Attributes:
        prompt_tokens_left: of its prompt, until its first token came.
    """

    instance_id: str
    used_tokens: int
    remaining_tokens: int
    prompt_tokens_left: int = 0


def peak_tokens(requests: Iterable[tuple[int, int]]) -> int:
    """The most KV tokens that requests, (used, remaining), hold at once, if each writes a token at a time and ends."""
    used = peak = 0
    for position, (has, remaining) in enumerate(sorted(requests, key=lambda request: -request[1]), start=1):
        used += has
        peak = max(peak, used + remaining * position)
    return peak


class Capacity:
    """Judges views of workers.

    Args:
        default_slots: of a decode worker that does not report its own.
        prefill_lookahead_tokens: prompt tokens that may wait for each prefill worker.
        decode_lookahead_tokens: and for each decode worker.
    """

    def __init__(self, *, default_slots: int, prefill_lookahead_tokens: int, decode_lookahead_tokens: int) -> None:
        self._default_slots = default_slots
        self._prefill_lookahead_tokens = prefill_lookahead_tokens
        self._decode_lookahead_tokens = decode_lookahead_tokens

    def room(
        self,
        views: Sequence[InstanceView],
        demand: Demand,
        *,
        on_their_way: Sequence[Held],
        held_tokens: int,
        held: Callable[[], Sequence[Held]],
        is_beyond_share: bool = False,
    ) -> Room:
        """Whether `demand` may go to the workers now.

        Args:
            on_their_way: choices let in that are on no worker yet.
            held_tokens: what all choices let in have and will have, at most.
            held: these choices; called only where their sum does not say enough.
            is_beyond_share: its tenant has his share of all slots; whoever comes next need not wait for its prompt.
        """
        decodes = [view for view in views if view.role == "decode" and view.usable]
        if not decodes:
            return Room.NO_WORKER
        prefills = [view for view in views if view.role == "prefill" and view.usable]
        if not self._has_prompt_room(decodes, prefills, on_their_way, _BEYOND_SHARE if is_beyond_share else 1.0):
            return Room.PROMPTS
        slots = sum(map(self._slots, decodes))
        taken = sum(view.requests for view in decodes) + len(on_their_way)
        if taken and taken + min(demand.choices, max(slots // _MOST_OF_SLOTS, 1)) > slots:
            return Room.SLOTS
        if any(not view.kv_blocks_total for view in decodes):
            return Room.OPEN
        wanted = demand.choices * (demand.prompt_tokens + demand.output_tokens)
        is_alone = all(view.running_requests + view.waiting_requests <= view.own_requests for view in decodes)
        if is_alone and held_tokens + wanted <= _SURELY_SHARE * min(v.kv_blocks_total * v.block_size for v in decodes):
            return Room.OPEN
        return Room.OPEN if self._has_memory(decodes, held(), on_their_way, demand) else Room.MEMORY

    def num_slots(self, views: Sequence[InstanceView]) -> int:
        """Of all decode workers that are ready."""
        return sum(self._slots(view) for view in views if view.role == "decode" and view.usable)

    def num_readers(self, views: Sequence[InstanceView]) -> int:
        """Workers that read prompts: the prefill pool, or the decode workers where there is none that is ready."""
        by_role = {role: sum(view.role == role and view.usable for view in views) for role in ("prefill", "decode")}
        return by_role["prefill"] or by_role["decode"]

    def _slots(self, view: InstanceView) -> int:
        slots = view.max_running_requests or self._default_slots
        return slots + slots // _SLOTS_PER_SPARE

    def _has_prompt_room(
        self,
        decodes: Sequence[InstanceView],
        prefills: Sequence[InstanceView],
        on_their_way: Sequence[Held],
        share: float,
    ) -> bool:
        readers = prefills or decodes
        backlog = sum(each.prompt_tokens_left for each in on_their_way)
        backlog += sum(view.prefill_tokens for view in (*prefills, *decodes))
        bound = len(prefills) * self._prefill_lookahead_tokens + len(decodes) * self._decode_lookahead_tokens
        if backlog < bound * share:
            return True
        prompts = sum(view.requests if view.role == "prefill" else view.prefill_tokens > 0 for view in readers)
        return prompts + len(on_their_way) < _MIN_PROMPTS * len(readers) * share and bool(prefills)

    def _has_memory(
        self, decodes: Sequence[InstanceView], held: Sequence[Held], on_their_way: Sequence[Held], demand: Demand
    ) -> bool:
        by_worker: dict[str, list[Held]] = {}
        for each in held:
            by_worker.setdefault(each.instance_id, []).append(each)
        wanted = [(demand.prompt_tokens, demand.output_tokens)] * min(demand.choices, _MOST_OF_SLOTS)
        # Whoever is on its way may go to any of them: the roomiest of several, and to the only one of one.
        num_ahead = -(-len(on_their_way) // len(decodes))
        ahead = sorted(((each.used_tokens, each.remaining_tokens) for each in on_their_way), reverse=True)[:num_ahead]
        return any(self._fits(view, by_worker.get(view.instance_id, ()), ahead, wanted) for view in decodes)

    def _fits(
        self,
        view: InstanceView,
        own: Sequence[Held],
        ahead: list[tuple[int, int]],
        wanted: list[tuple[int, int]],
    ) -> bool:
        size = view.block_size
        total = view.kv_blocks_total * size * _FULL_SHARE
        here = [(each.used_tokens, each.remaining_tokens) for each in own]
        others = view.running_requests + view.waiting_requests - len(here)
        if others > 0:
            # Another router's: what is reported over this router's own, in equal parts.
            used = max(view.context_tokens - sum(has for has, _ in here), 0) // others
            left = max(view.max_remaining_tokens - sum(rest for _, rest in here), 0) // others
            here += [(used, left)] * others
        if not here and not ahead:
            return True  # alone: it fits, or never will
        requests = [(has + size, rest) for has, rest in (*here, *ahead, *wanted)]
        if sum(has + rest for has, rest in requests) <= total:
            return True
        peak = peak_tokens(requests)
        if peak <= total:
            return True
        # Prompts that begin alike share their pages: then what is free counts, and how much more than now is needed.
        growth = peak - sum(each.used_tokens + size for each in own if not each.prompt_tokens_left)
        return growth <= (view.kv_blocks_free + view.kv_blocks_cached) * size * _FULL_SHARE
