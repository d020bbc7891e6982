"""Which row of the tables on the device belongs to which sequence. Pure.

A running sequence keeps its row (its *slot*) from step to step wherever it stands in the batch, so that a step sends
only what is new: a new sequence's blocks, and each block that a sequence has got since.

    unknown --place--> held (slot, number of blocks that the device knows) --least recently placed--> unknown

Sequences are known by their list of block ids, the very object: the scheduler makes a new one whenever a sequence gets
its blocks anew, and otherwise only adds to its end. Nobody says when a sequence is gone: with twice as many slots as a
batch has rows, the one that was not placed for longest is in neither this step nor the one before, which may still run.
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

__all__ = ["Placement", "SequenceSlots"]


@dataclass(slots=True)
class Placement:
    """Where one sequence is.

    Attributes:
        block_ids: its list; held, so that no other object gets its identity.
        slot: row of the tables.
        num_blocks: leading blocks that the device knows or is told in this step.
        step: when it was placed last.
    """

    block_ids: list[int]
    slot: int
    num_blocks: int
    step: int


class SequenceSlots:
    """Slots 0 .. num_slots - 1.

    Args:
        num_slots: at least twice the rows of a batch.
    """

    def __init__(self, num_slots: int) -> None:
        self.num_slots = num_slots
        self._free = list(range(num_slots - 1, -1, -1))
        self._held: OrderedDict[int, Placement] = OrderedDict()  # least recently placed first
        self._step = 0

    def begin_step(self) -> None:
        """What is placed from now on is of the next step."""
        self._step += 1

    def place(self, block_ids: list[int]) -> tuple[Placement, bool]:
        """The sequence's slot, and whether it is new to the device; the caller brings `num_blocks` up to date."""
        identity = id(block_ids)
        placement = self._held.get(identity)
        if placement is not None:
            assert placement.step < self._step, "a sequence has two rows in a step"
            placement.step = self._step
            self._held.move_to_end(identity)
            return placement, False
        if self._free:
            slot = self._free.pop()
        else:
            _, oldest = self._held.popitem(last=False)
            assert oldest.step < self._step - 1, "more sequences than slots"
            slot = oldest.slot
        placement = self._held[identity] = Placement(block_ids, slot, 0, self._step)
        return placement, True
