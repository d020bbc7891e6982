"""Which worker holds which prefix: pure, time is an argument. Told by the workers, ahead of them by predictions.

    block events of a worker --> observed: key -> mask of holders, by tier --.
    own and others' choices ---> predicted: the same, for some seconds ------+--> match(keys): leading blocks, by worker

A key stands for a whole prefix (see `engine/prefix_cache.py`), so a worker holds as many leading blocks of a prompt as
it holds keys of it without a break. A wrong guess costs time, not correctness: the worker's own cache decides what is
really reused. Of a worker whose signal is stale (see `block_feed.py`) predictions alone are used.

Ownership: a worker is one bit. Each holder has the keys of its own blocks; one that is forgotten counts no more at
once, and `sweep` takes its keys out piece by piece, so that no request waits for it. Its bit is given back after that,
two generations of predictions later.
"""

from __future__ import annotations

from collections.abc import Sequence

from baton.proto.baton.v1 import worker_pb2 as pb
from baton.router.block_feed import STALE_AFTER_S, BlockFeed, Freshness, Verdict
from baton.router.predictions import Predictions

__all__ = ["TIER_CREDIT", "PrefixIndex"]

TIER_CREDIT: dict[int, float] = {pb.DEVICE: 1.0, pb.HOST: 0.75, pb.DISK: 0.25}
"""What a block is worth that must first be fetched from there, against one that is in the device's memory."""
_TIERS = tuple(TIER_CREDIT)
_MAX_ENTRIES = 4_000_000


class _Holder:
    """One incarnation of one worker.

    Attributes:
        bit: its mask.
        keys: of its blocks, by tier.
        told: by tier, what the parts of an unfinished snapshot have told; None: there is none.
    """

    __slots__ = ("bit", "feed", "incarnation", "instance_id", "keys", "told")

    def __init__(self, instance_id: str, incarnation: bytes, bit: int, feed: BlockFeed) -> None:
        self.instance_id = instance_id
        self.incarnation = incarnation
        self.bit = bit
        self.feed = feed
        self.keys: dict[int, set[int]] = {tier: set() for tier in _TIERS}
        self.told: dict[int, set[int]] | None = None


class PrefixIndex:
    """Block key -> the workers that hold it.

    Args:
        max_entries: (worker, block) pairs kept; a worker that tells of more is refused, and stale.
        stale_after_s: see `BlockFeed`.
    """

    def __init__(
        self,
        *,
        max_entries: int = _MAX_ENTRIES,
        stale_after_s: float = STALE_AFTER_S,
        predictions: Predictions | None = None,
    ) -> None:
        assert max_entries > 0, max_entries
        self._stale_after_s = stale_after_s
        self._max_entries = max_entries
        self._num_entries = 0
        self._observed: dict[int, dict[int, int]] = {tier: {} for tier in _TIERS}
        self._predictions = predictions or Predictions()
        self._holders: dict[str, _Holder] = {}
        self._by_bit: dict[int, _Holder] = {}
        self._leaving: list[_Holder] = []
        self._trusted = 0  # bits of those that are not stale
        self._free_bits: list[int] = []
        self._retired_bits: list[tuple[int, int]] = []  # the generation of predictions that may know one, and it
        self._num_bits = 0

    def __len__(self) -> int:
        """Blocks known of in all."""
        return len(set().union(*self._observed.values())) if self._has_tiers else len(self._observed[pb.DEVICE])

    # ------------------------------------------------------------ what workers tell

    def opened(self, instance_id: str, incarnation: bytes, now_s: float) -> None:
        """A stream of this worker has begun. Another incarnation's blocks are gone."""
        holder = self._holders.get(instance_id)
        if holder is not None and holder.incarnation not in (incarnation, b""):
            self.forget(instance_id)
        holder = self._holder(instance_id)
        holder.incarnation, holder.told = incarnation, None
        holder.feed.opened(now_s)

    def closed(self, instance_id: str, incarnation: bytes, now_s: float) -> None:
        """The stream has ended."""
        holder = self._holders.get(instance_id)
        if holder is not None and holder.incarnation == incarnation:
            holder.told = None
            holder.feed.closed(now_s)

    def apply(self, instance_id: str, incarnation: bytes, events: pb.BlockEvents, now_s: float) -> bool:
        """The next batch; true: ask for a snapshot, something was missed."""
        holder = self._holders.get(instance_id)
        if holder is None or holder.incarnation != incarnation:
            return False
        if events.tier not in TIER_CREDIT:
            return self._refuse(holder, f"it tells of a tier {events.tier}, which is unknown here")
        verdict = holder.feed.accept(events, now_s)
        if verdict is Verdict.IGNORE:
            return False
        if verdict is Verdict.ASK:
            return True
        if verdict is Verdict.BEGIN_SNAPSHOT:
            holder.told = {tier: set() for tier in _TIERS}
        stored = list(events.stored)
        if events.snapshot:
            assert holder.told is not None
            holder.told[events.tier].update(stored)
        elif events.cleared:
            for tier in _TIERS:
                self._remove(holder, tier, list(holder.keys[tier]))
        self._remove(holder, events.tier, events.removed)
        if self._num_entries + len(stored) > self._max_entries:
            return self._refuse(holder, f"the index is full ({self._max_entries} blocks of all workers)")
        self._store(holder, events.tier, stored)
        if events.snapshot and not events.more:
            for tier, told in (holder.told or {}).items():
                self._remove(holder, tier, holder.keys[tier] - told)
            holder.told = None
        if holder.feed.freshness is Freshness.SYNCED:
            self._trusted |= holder.bit
        return False

    def forget(self, instance_id: str) -> None:
        """The worker is gone, and its cache with it."""
        holder = self._holders.pop(instance_id, None)
        if holder is None:
            return
        del self._by_bit[holder.bit]
        self._trusted &= ~holder.bit
        self._leaving.append(holder)

    def sweep(self, max_keys: int) -> bool:
        """Takes out some keys of those that were forgotten; true: there are more."""
        while self._leaving:
            holder = self._leaving[-1]
            for tier in _TIERS:
                own, observed, others = holder.keys[tier], self._observed[tier], ~holder.bit
                while own:
                    if not max_keys:
                        return True
                    max_keys -= 1
                    self._num_entries -= 1
                    _unmark(observed, own.pop(), others)
            self._leaving.pop()
            self._retired_bits.append((self._predictions.generation, holder.bit))
        return False

    # ------------------------------------------------------------ what is chosen

    def predict(self, instance_id: str, keys: Sequence[int], now_s: float) -> None:
        """A request was sent there that will leave these blocks in its cache."""
        self._predictions.add(self._holder(instance_id).bit, keys, now_s)

    def match(self, keys: Sequence[int], now_s: float) -> dict[str, int]:
        """Worker -> number of leading blocks of a prompt that it holds, whole ones; those with none are absent.

        Blocks of lower tiers count for less, see `TIER_CREDIT`.
        """
        predictions = self._predictions
        predictions.expire(now_s)
        if self._has_tiers:
            return {name: blocks for name, holder in self._holders.items() if (blocks := self._credit(holder, keys))}
        observed, young, old = self._observed[pb.DEVICE].get, predictions.young.get, predictions.old.get
        foresees, trusted = bool(predictions.young or predictions.old), self._trusted
        alive = 0
        for bit in self._by_bit:
            alive |= bit
        matched: dict[str, int] = {}
        depth = 0
        for key in keys:
            mask = observed(key, 0) & trusted
            if foresees:
                mask |= young(key, 0) | old(key, 0)
            mask &= alive
            if mask != alive:
                if depth:
                    self._note(alive & ~mask, depth, matched)
                alive = mask
                if not mask:
                    return matched
            depth += 1
        if depth:
            self._note(alive, depth, matched)
        return matched

    # ------------------------------------------------------------ how true it is

    def look(self, now_s: float) -> list[tuple[str, str]]:
        """Those that have become stale by now, and why."""
        found = []
        for holder in self._holders.values():
            if holder.feed.look(now_s):
                self._trusted &= ~holder.bit
                found.append((holder.instance_id, holder.feed.reason))
        return found

    def freshness(self, instance_id: str) -> Freshness:
        """Of a worker's signal."""
        holder = self._holders.get(instance_id)
        return holder.feed.freshness if holder is not None else Freshness.UNKNOWN

    def reason(self, instance_id: str) -> str:
        """Why a worker's signal is not in sync."""
        holder = self._holders.get(instance_id)
        return holder.feed.reason if holder is not None else ""

    def stale(self) -> list[str]:
        """Workers whose signal is stale."""
        return [name for name, holder in self._holders.items() if holder.feed.freshness is Freshness.STALE]

    def num_held(self, instance_id: str) -> int:
        """Blocks that a worker has told of, in all tiers."""
        holder = self._holders.get(instance_id)
        return sum(map(len, holder.keys.values())) if holder is not None else 0

    def held(self, instance_id: str) -> frozenset[int]:
        """The keys of all blocks that a worker has told of."""
        holder = self._holders.get(instance_id)
        return frozenset().union(*holder.keys.values()) if holder is not None else frozenset()

    # ------------------------------------------------------------ inside

    @property
    def _has_tiers(self) -> bool:
        return bool(self._observed[pb.HOST] or self._observed[pb.DISK])

    def _holder(self, instance_id: str) -> _Holder:
        holder = self._holders.get(instance_id)
        if holder is None:
            holder = _Holder(instance_id, b"", self._take_bit(), BlockFeed(self._stale_after_s))
            self._holders[instance_id] = self._by_bit[holder.bit] = holder
            self._trusted |= holder.bit
        return holder

    def _take_bit(self) -> int:
        # No prediction knows it any more once both generations have ended.
        while self._retired_bits and self._predictions.generation - self._retired_bits[0][0] >= 2:
            self._free_bits.append(self._retired_bits.pop(0)[1])
        if self._free_bits:
            return self._free_bits.pop()
        self._num_bits += 1
        return 1 << (self._num_bits - 1)

    def _refuse(self, holder: _Holder, reason: str) -> bool:
        holder.feed.refuse(reason)
        holder.told = None
        self._trusted &= ~holder.bit
        for tier in _TIERS:
            self._remove(holder, tier, list(holder.keys[tier]))
        return False

    def _store(self, holder: _Holder, tier: int, keys: Sequence[int]) -> None:
        own, observed, bit, predictions = holder.keys[tier], self._observed[tier], holder.bit, self._predictions
        before = len(own)
        own.update(keys)
        self._num_entries += len(own) - before
        for key in keys:
            observed[key] = observed.get(key, 0) | bit
        if predictions.young or predictions.old:
            for key in keys:
                predictions.confirm(bit, key)

    def _remove(self, holder: _Holder, tier: int, keys: Sequence[int] | set[int]) -> None:
        own, observed, others = holder.keys[tier], self._observed[tier], ~holder.bit
        for key in keys:
            if key in own:
                own.remove(key)
                self._num_entries -= 1
                _unmark(observed, key, others)

    def _note(self, mask: int, depth: int, matched: dict[str, int]) -> None:
        """All workers of `mask` hold `depth` blocks and no more."""
        while mask:
            bit = mask & -mask
            matched[self._by_bit[bit].instance_id] = depth
            mask ^= bit

    def _credit(self, holder: _Holder, keys: Sequence[int]) -> int:
        """Leading blocks that a worker holds in any tier, by their worth."""
        young, old, bit = self._predictions.young, self._predictions.old, holder.bit
        tiers = [(holder.keys[tier], TIER_CREDIT[tier]) for tier in _TIERS] if self._trusted & bit else []
        credit = 0.0
        for key in keys:
            if (young.get(key, 0) | old.get(key, 0)) & bit:
                credit += 1
                continue
            worth = next((worth for held, worth in tiers if key in held), 0.0)
            if not worth:
                break
            credit += worth
        return int(credit)


def _unmark(observed: dict[int, int], key: int, others: int) -> None:
    mask = observed[key] & others
    if mask:
        observed[key] = mask
    else:
        del observed[key]
