"""The product's engine and KV pages, with the checks that hold at every step.

After each step every block is where the books say and is owned by whom they say; before each write, by the model or of
pages that come, the block is the writer's own; pages that leave are held as long as the copy takes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.simulation.model import SimRunner
from tests.simulation.process import Process
from tests.simulation.threads import sleep
from tests.simulation.world import World
from torch import Tensor

from baton.engine.engine import Engine, StepResult
from baton.engine.pages import KvPages
from baton.engine.sequence import SequenceState

__all__ = ["SimEngine"]


class SimEngine(Engine):
    """The product's engine; see the module's text."""

    _world: World
    _process: Process

    def watch(self, world: World, process: Process, copy_s: float) -> None:
        """Begin to check."""
        self._world, self._process, self.copy_s = world, process, copy_s
        assert isinstance(self.runner, SimRunner)
        self.pages = _CheckedPages(self, self.runner.kv, self.runner.layout.block_size)
        self.runner.on_write = self.check_writable
        self.num_steps = 0

    def step(self, *args: Any) -> StepResult:
        """See `Engine`."""
        result = super().step(*args)
        self.num_steps += 1
        self.check_books()
        return result

    def check_books(self) -> None:
        """Block conservation: free + cached + owned is all there is, and what is owned is some sequence's."""
        try:
            self.pool.check()
        except AssertionError as error:
            self._fail("no block is lost, none has two owners", str(error))
            return
        references = [0] * self.pool.num_blocks
        for seq in self.scheduler.sequences():
            for block in seq.block_ids:
                references[block] += 1
        if references != self.pool._references:
            self._fail("no block is lost, none has two owners", f"{self.pool._references} != {references} of sequences")

    def check_writable(self, blocks: Sequence[int]) -> None:
        """Before the model writes."""
        for block in blocks:
            if not self.pool.writable(block):
                self._fail("single owner", f"the engine writes into block {block}, which is shared, cached or free")

    def _fail(self, checker: str, text: str) -> None:
        self._world.fail(checker, f"{self._process.name}: {text}")


class _CheckedPages(KvPages):
    """The product's pages; what is written must be reserved for it, what is read must be held, as long as it takes."""

    def __init__(self, engine: SimEngine, kv: Tensor, block_size: int) -> None:
        super().__init__(kv, block_size)
        self._engine = engine
        self._size = block_size

    def _holders(self, block_ids: Sequence[int]) -> list[Any]:
        return [seq for seq in self._engine.scheduler.sequences() if seq.block_ids[: len(block_ids)] == list(block_ids)]

    def _check_reserved(self, block_ids: Sequence[int], tokens: tuple[int, int]) -> None:
        states = [seq.state for seq in self._holders(block_ids)]
        if SequenceState.RESERVED not in states:
            text = f"pages come for blocks {list(block_ids)}, which nobody has reserved: {states}"
            self._engine._fail("single owner", text)
        self._engine.check_writable(self._touched(block_ids, tokens))

    def _check_held(self, block_ids: Sequence[int]) -> None:
        if not self._holders(block_ids):
            self._engine._fail("single owner", f"pages leave from blocks {list(block_ids)}, which nobody holds")

    def _touched(self, block_ids: Sequence[int], tokens: tuple[int, int]) -> list[int]:
        return list(block_ids[tokens[0] // self._size : -(-tokens[1] // self._size)])

    def scatter(
        self,
        block_ids: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        payload: Tensor,
        *,
        heads: tuple[int, int] | None = None,
    ) -> int:
        """See `KvPages`."""
        self._check_reserved(block_ids, tokens)
        sleep(self._engine.copy_s)
        self._check_reserved(block_ids, tokens)
        return super().scatter(block_ids, layers, tokens, payload, heads=heads)

    def gather(
        self,
        block_ids: Sequence[int],
        layers: tuple[int, int],
        tokens: tuple[int, int],
        out: Tensor,
        *,
        heads: tuple[int, int] | None = None,
    ) -> int:
        """See `KvPages`."""
        self._check_held(block_ids)
        sleep(self._engine.copy_s)
        self._check_held(block_ids)
        return super().gather(block_ids, layers, tokens, out, heads=heads)
