"""Launches steps on a device without waiting for them: the engine's way to a GPU.

    launch(plan)  --> pack (host) --one copy--> batch, layers, draw (device) --one copy--> tokens (host)
    collect(step) --> waits for the second copy

    LaunchedStep:  launched --collect--> landed

Steps run on the device in the order of their launches. The tokens that a step draws stay there, where the next step
finds them by slot; so a step may be launched before the one ahead of it has landed. A step whose sampling needs the
host (penalties, masks, log-probabilities) draws nothing: its logits are read, and the step behind it waits until the
host has drawn (`LaunchedStep.needs_host`).

Decode steps replay a graph of the next larger batch size, where there is one; padding rows belong to the scratch slot,
whose block is nobody's. Everything else is launched kernel by kernel.

Ownership: the launcher owns the tables on the device and all static buffers; one thread calls it. Which rows a step has
is decided elsewhere (`scheduler.py`), how they are laid out in `step_packing.py`. What a launch or a collect raises is
the end of the launcher: steps on the device may still use its memory, which is not used again.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from baton.engine.device_state import SAMPLING_WORDS, DeviceState
from baton.engine.graph_buckets import GraphBuckets
from baton.engine.graph_capture import GraphBackend, Replay
from baton.engine.kv_layout import KvLayout
from baton.engine.model import ForwardBatch, OnLayers
from baton.engine.sampler import RequestSampler
from baton.engine.scheduler import Row, StepPlan
from baton.engine.sequence import Key
from baton.engine.sequence_slots import SequenceSlots
from baton.engine.step_buffers import StepBuffers, StepSet
from baton.engine.step_packing import ON_DEVICE, StepPacker, TokenRows
from baton.errors import ConfigError

__all__ = ["LAUNCHED_AHEAD", "LaunchableRunner", "LaunchedStep", "OnCapture", "StepLauncher"]

OnCapture = Callable[[int, int], None]
"""Called with (graphs recorded so far, graphs in all)."""

LAUNCHED_AHEAD = 2
"""Steps on the device: one that is computed, and the next one, so that the device never waits for the host."""
_STEP_DEADLINE_S = 60.0


class LaunchableRunner(Protocol):
    """What the launcher needs of a model: `engine.runner.ModelRunner`, or `engine.fake.FakeRunner`.

    Attributes:
        scratch_block: a block behind those of the pool, which no sequence gets.
    """

    layout: KvLayout
    max_model_len: int
    vocab_size: int

    @property
    def device(self) -> torch.device: ...
    @property
    def scratch_block(self) -> int | None: ...

    def forward(
        self,
        batch: ForwardBatch,
        on_layers: OnLayers | None = None,
        layers_per_group: int = 4,
        out: Tensor | None = None,
    ) -> Tensor:
        """See `ModelRunner.forward`."""
        ...


@dataclass(slots=True, eq=False)
class LaunchedStep:
    """A step on its way.

    Attributes:
        num_tokens: how many it draws on the device.
        logits: fp32 [R, V] of a step that the host samples, valid until the next launch; else None.
    """

    num_tokens: int
    logits: Tensor | None
    buffers: StepSet

    @property
    def needs_host(self) -> bool:
        """Whether nothing can be launched behind this step before its tokens are known."""
        return self.logits is not None


class StepLauncher:
    """Launches steps of one runner.

    Args:
        runner: with a scratch block.
        max_batch_tokens, max_batch_size: of the largest step.
        graphs: where graphs of decode steps are recorded; None: none are.
        buckets: sizes of these; None: the usual ones up to `max_batch_size`.
        max_steps_in_flight: launched and not collected.
        deadline_s: how long `collect` waits.
    """

    def __init__(
        self,
        runner: LaunchableRunner,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        graphs: GraphBackend | None = None,
        buckets: GraphBuckets | None = None,
        max_steps_in_flight: int = LAUNCHED_AHEAD,
        deadline_s: float = _STEP_DEADLINE_S,
    ) -> None:
        assert runner.scratch_block is not None, "padding rows need a block of their own"
        # A row is one token at least.
        max_batch_size = min(max_batch_size, max_batch_tokens)
        block_size = runner.layout.block_size
        max_blocks = -(-runner.max_model_len // block_size)
        slots = SequenceSlots(2 * max_batch_size)
        self._runner = runner
        self._graphs = graphs
        self._buckets = GraphBuckets(()) if graphs is None else buckets or GraphBuckets.up_to(max_batch_size)
        assert self._buckets.largest <= max_batch_size
        self._deadline_s = deadline_s
        self._packer = StepPacker(
            slots,
            block_size=block_size,
            max_blocks=max_blocks,
            scratch_block=runner.scratch_block,
            sampling_bytes=8 * SAMPLING_WORDS,
        )
        num_words = self._packer.capacity_words(max_batch_tokens=max_batch_tokens, max_batch_size=max_batch_size)
        self._buffers = StepBuffers(
            max_steps_in_flight, num_words=num_words, max_rows=max_batch_size, device=runner.device
        )
        self._state = DeviceState(
            num_slots=slots.num_slots,
            max_blocks=max_blocks,
            block_size=block_size,
            scratch_block=runner.scratch_block,
            num_words=num_words,
            max_rows=max_batch_size,
            device=runner.device,
        )
        self._logits = torch.zeros((self._buckets.largest, runner.vocab_size), device=runner.device)
        self._replays: dict[int, Replay] = {}

    @property
    def num_graphs(self) -> int:
        """Graphs that `warm_up` records."""
        return len(self._buckets.sizes)

    @torch.inference_mode()
    def warm_up(self, on_capture: OnCapture | None = None) -> None:
        """Records the graphs, largest first; until then, and without, decode steps are launched kernel by kernel.

        Raises:
            ConfigError: a step cannot be recorded here.
        """
        if self._graphs is None:
            return
        for index, bucket in enumerate(self._buckets.capture_order):
            self._state.clear_decode(bucket, self._packer.scratch_slot)
            try:
                self._replays[bucket] = self._graphs.capture(functools.partial(self._decode, bucket))
            except RuntimeError as error:
                raise ConfigError(
                    f"the CUDA graph of a decode step of {bucket} rows cannot be recorded ({error}); set"
                    " gpu.cuda_graphs: false to go without (slower)"
                ) from error
            if on_capture is not None:
                on_capture(index + 1, self.num_graphs)

    @torch.inference_mode()
    def launch(
        self,
        plan: StepPlan,
        samplers: Mapping[Key, RequestSampler],
        on_layers: OnLayers | None = None,
        layers_per_group: int = 4,
    ) -> LaunchedStep:
        """Enqueues a step.

        Args:
            plan: tokens that are not known yet were drawn by the step launched before this one.
            samplers: of every sequence of the plan.
            on_layers, layers_per_group: see `ModelRunner.forward`.
        """
        rows = plan.rows
        own = [samplers[row.seq.key] for row in rows]
        buffers = self._buffers.take()
        if plan.num_decode_rows == len(rows) and all(sampler.is_plain for sampler in own):
            bucket = self._buckets.of(len(rows))
            if bucket is not None and bucket in self._replays:
                step = self._launch_decode(bucket, rows, own, buffers)
                self._tell_of_layers(on_layers, layers_per_group)
                return step
        return self._launch_any(rows, own, buffers, on_layers, layers_per_group)

    def collect(self, step: LaunchedStep) -> npt.NDArray[np.int64]:
        """The tokens that a step has drawn, in the order of its rows that sample: a copy, [num_tokens].

        Raises:
            DeadlineError: the device hangs.
        """
        tokens = step.buffers.wait(step.num_tokens, self._deadline_s).copy()
        self._buffers.give_back(step.buffers)
        return tokens

    # ------------------------------------------------------------ inside

    def _launch_decode(
        self, bucket: int, rows: Sequence[Row], samplers: Sequence[RequestSampler], buffers: StepSet
    ) -> LaunchedStep:
        packed = self._packer.pack_decode(
            buffers.words,
            bucket,
            [row.seq.block_ids for row in rows],
            [row.start for row in rows],
            [_token(row) for row in rows],
            [sampler.packed for sampler in samplers],
        )
        buffers.upload(self._state.words, packed.num_words)
        self._state.update(packed)
        self._replays[bucket]()
        buffers.download(self._state.drawn(len(rows)))
        return LaunchedStep(len(rows), None, buffers)

    def _tell_of_layers(self, on_layers: OnLayers | None, layers_per_group: int) -> None:
        """After a replay, which cannot stop between layers."""
        if on_layers is not None:
            num_layers = self._runner.layout.num_layers
            for begin in range(0, num_layers, layers_per_group):
                on_layers(begin, min(begin + layers_per_group, num_layers))

    def _decode(self, bucket: int) -> None:
        """What a graph holds: from the decode fields to the drawn tokens."""
        logits = self._logits[:bucket]
        self._forward(self._state.decode_batch(bucket), out=logits)
        self._state.draw_decode(bucket, logits)

    def _launch_any(
        self,
        rows: Sequence[Row],
        samplers: Sequence[RequestSampler],
        buffers: StepSet,
        on_layers: OnLayers | None,
        layers_per_group: int,
    ) -> LaunchedStep:
        draws = not any(_needs_host(row, sampler) for row, sampler in zip(rows, samplers, strict=True))
        token_rows = [_token_rows(row, sampler) for row, sampler in zip(rows, samplers, strict=True)]
        packed = self._packer.pack(buffers.words, token_rows, draws=draws)
        buffers.upload(self._state.words, packed.num_words)
        self._state.update(packed)
        logits = self._runner.forward(self._state.batch(packed), on_layers, layers_per_group)
        num_tokens = self._state.draw(packed, logits)
        buffers.download(self._state.drawn(num_tokens))
        return LaunchedStep(num_tokens, None if draws else logits, buffers)

    def _forward(self, batch: ForwardBatch, out: Tensor) -> None:
        logits = self._runner.forward(batch, None, 1, out)
        if logits.data_ptr() != out.data_ptr():
            out.copy_(logits)


def _token(row: Row) -> int:
    """The token of a decode row."""
    known = row.seq.token_ids
    return known[row.start] if row.start < len(known) else ON_DEVICE


def _needs_host(row: Row, sampler: RequestSampler) -> bool:
    return row.seq.wants_prompt_logprobs or (row.samples and not sampler.is_plain)


def _token_rows(row: Row, sampler: RequestSampler) -> TokenRows:
    seq = row.seq
    wants_logits = row.count if seq.wants_prompt_logprobs else int(row.samples)
    tokens = seq.token_ids[row.start : row.start + row.count]
    return TokenRows(seq.block_ids, tokens, row.start, wants_logits, sampler.packed)
