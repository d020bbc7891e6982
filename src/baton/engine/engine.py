"""One worker's engine: scheduler + model runner + sampler, driven step by step by a single thread; knows no network.

    one step at a time     plan -> forward -> sample                           (one rank on CPU)
    stages                 plan, begin ... until all stages have a step; then finish the oldest, sample
    launched               plan, launch (draws too) ... until two are on the device; then collect the oldest's tokens

Ownership: the engine owns the sequences, the KV pool's blocks and the runner. All methods are called from one thread
(the engine loop's), except those of `pages`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
from torch import Tensor

from baton.engine.block_pool import BlockPool
from baton.engine.kv_layout import KvLayout
from baton.engine.logits import LogitsProcessor
from baton.engine.pages import KvPages
from baton.engine.request import EngineRequest, FinishReason, RequestOutput, TokenLogprobs
from baton.engine.request_check import why_unfit
from baton.engine.runner import BatchBuffers, ForwardBatch, SequenceRows
from baton.engine.sampler import RequestSampler, Sampled, SamplerRow, draw_plain, sample, token_logprobs
from baton.engine.scheduler import Row, Scheduler, StepPlan
from baton.engine.sequence import Key, SequenceState
from baton.engine.sequence import Sequence as EngineSequence
from baton.engine.step_launcher import LAUNCHED_AHEAD, LaunchedStep, StepLauncher
from baton.kernels import ops

__all__ = [
    "Engine",
    "EngineLoad",
    "OnLayers",
    "Pipelined",
    "PlainToken",
    "Runner",
    "Said",
    "StepResult",
    "spell_out",
]

OnLayers = Callable[[StepPlan, int, int], None]
"""Called with (plan, layer_begin, layer_end) on the engine thread when the KV of these layers is written."""


class Runner(Protocol):
    """What the engine needs of a model: `engine.runner.ModelRunner`, or `engine.fake.FakeRunner`."""

    layout: KvLayout
    kv: Tensor
    num_blocks: int
    max_model_len: int
    vocab_size: int
    fingerprint: str
    eos_token_ids: tuple[int, ...]
    buffers: BatchBuffers

    def forward(
        self, batch: ForwardBatch, on_layers: Callable[[int, int], None] | None = None, layers_per_group: int = 4
    ) -> Tensor:
        """Computes a batch, writes its KV, returns fp32 logits [num logit rows, vocab_size]."""
        ...


@runtime_checkable
class Pipelined(Protocol):
    """What a runner that works at several steps at once has besides: `engine.parallel_runner.ParallelRunner`."""

    def begin(
        self, batch: ForwardBatch, on_layers: Callable[[int, int], None] | None = None, layers_per_group: int = 4
    ) -> Any:
        """Starts a step and returns its handle; the batch's buffers may be used again."""
        ...

    def finish(self, handle: Any) -> Tensor:
        """Logits of the oldest step that was begun."""
        ...


@dataclass(frozen=True, slots=True)
class EngineLoad:
    """A moment's figures, for routing and metrics."""

    running: int
    waiting: int
    blocks_total: int
    blocks_free: int
    blocks_cached: int
    blocks_owned: int
    pending_prefill_tokens: int
    slowness: float = 0.0
    """Of its steps lately, see `worker/slowness.py`; 0: not known."""
    preemptions: int = 0
    """Running requests put back so far, because blocks ran out."""
    context_tokens: int = 0
    """Of all requests here: tokens whose KV is in their blocks, or on its way there."""
    max_remaining_tokens: int = 0
    """Tokens that they may still write."""
    max_running: int = 0
    """Requests that the batch holds at most."""


PlainToken = tuple[Key, int]
"""A request and its next token, with nothing else to say."""

Said = RequestOutput | PlainToken


def spell_out(said: Said) -> RequestOutput:
    """The output that a plain token is short for; others as they are."""
    if isinstance(said, RequestOutput):
        return said
    (request_id, attempt), token_id = said
    return RequestOutput(request_id=request_id, attempt=attempt, token_ids=[token_id])


@dataclass(slots=True)
class StepResult:
    """What a step did: the plan it carried out and what it says about requests.

    With several steps in flight `plan.rows` are those of the step that has ended, and the other lists tell of the
    plans made since the last result.

    Attributes:
        said: per request a (key, token id) where that is all there is to say, which is nearly always, or more.
    """

    plan: StepPlan
    said: list[Said] = field(default_factory=list)

    @property
    def outputs(self) -> tuple[RequestOutput, ...]:
        """`said`, spelled out."""
        return tuple([spell_out(said) for said in self.said])


class Engine:
    """Continuous batching over one runner.

    Args:
        runner: model and KV pool.
        max_batch_tokens, max_batch_size, max_prefill_tokens: per step (see `Scheduler`).
        layers_per_group: how many layers between two calls of `on_layers`.
        max_steps_in_flight: steps that are computed at once, as many as the runner has stages; more than one needs a
            `Pipelined` runner.
        launcher: of the runner's device, where steps are launched instead of called for; then the next step is planned
            and launched while this one's tokens are still on the device (`overlap`), unless the host has to sample it.
    """

    def __init__(
        self,
        runner: Runner,
        *,
        max_batch_tokens: int,
        max_batch_size: int,
        layers_per_group: int = 4,
        max_steps_in_flight: int = 1,
        max_prefill_tokens: int | None = None,
        launcher: StepLauncher | None = None,
        overlap: bool = True,
    ) -> None:
        self.runner = runner
        self.pool = BlockPool(runner.num_blocks, runner.layout.block_size)
        self.pages = KvPages(runner.kv, runner.layout.block_size)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            max_model_len=runner.max_model_len,
            eos_token_ids=runner.eos_token_ids,
            max_steps_in_flight=max_steps_in_flight,
            max_prefill_tokens=max_prefill_tokens,
        )
        self.layers_per_group = layers_per_group
        self.max_steps_in_flight = max_steps_in_flight if launcher is None or not overlap else LAUNCHED_AHEAD
        self._stages = runner if max_steps_in_flight > 1 and isinstance(runner, Pipelined) else None
        assert self._stages is not None or max_steps_in_flight == 1, "this runner works at one step at a time"
        assert self._stages is None or launcher is None, "stages are not launched"
        self._launcher = launcher
        self._in_flight: deque[tuple[StepPlan, Any]] = deque()
        self._samplers: dict[Key, RequestSampler] = {}

    @property
    def has_work(self) -> bool:
        """Whether `step` may do something."""
        return self.scheduler.has_work or bool(self._in_flight)

    def load(self) -> EngineLoad:
        """Figures of this moment."""
        counts = self.pool.counts()
        running = len(self.scheduler.running)
        waiting = len(self.scheduler) - running
        sums = self.scheduler.token_sums()
        return EngineLoad(
            running,
            waiting,
            counts.total,
            counts.free,
            counts.cached,
            counts.owned,
            sums.pending_prefill,
            context_tokens=sums.context,
            max_remaining_tokens=sums.max_remaining,
            max_running=self.scheduler.max_batch_size,
        )

    # ------------------------------------------------------------ requests

    def add(
        self, request: EngineRequest, *, remote_prefill: bool = False, prefill_only: bool = False, tag: int = 0
    ) -> str:
        """Queues a request; returns why it cannot be taken, or the empty string.

        Args:
            tag: by which every rank of the instance knows the sequence while its pages leave; 0 for none.
        """
        if self.scheduler.get((request.request_id, request.attempt)) is not None:
            return f"request {request.request_id} attempt {request.attempt} is already running here"
        limits = {"max_model_len": self.runner.max_model_len, "vocab_size": self.runner.vocab_size}
        if reason := why_unfit(request, **limits):
            return reason
        seq = self.scheduler.add(request, remote_prefill=remote_prefill, prefill_only=prefill_only, tag=tag)
        eos = self.runner.eos_token_ids
        processor = LogitsProcessor(request.sampling, request.prompt_token_ids, eos, self.runner.vocab_size)
        self._samplers[seq.key] = RequestSampler(request.sampling, processor)
        return ""

    def attach(
        self, key: Key, first_token_id: int, logprobs: TokenLogprobs | None, cached_tokens: int
    ) -> RequestOutput | None:
        """Pages of a RESERVED request have landed; returns its first output, None where the request is gone."""
        seq = self.scheduler.get(key)
        if seq is None:
            return None
        reason = self.scheduler.attach(key, first_token_id, cached_tokens)
        return self._output(seq, first_token_id, logprobs, reason)

    def prefill_here(self, key: Key) -> None:
        """The handover failed and has settled: compute the prompt in the reserved blocks."""
        if self.scheduler.get(key) is not None:
            self.scheduler.prefill_here(key)

    def hold(self, key: Key) -> None:
        """Stops computing a request whose pages are still being read; `release` ends it."""
        if self.scheduler.get(key) is not None:
            self.scheduler.hold(key)

    def release(self, key: Key) -> bool:
        """Ends a request in any state; nothing may touch its blocks any more. False where it is gone already."""
        self._forget(key)
        return self.scheduler.release(key)

    # ------------------------------------------------------------ one step

    def step(self, on_layers: OnLayers | None = None, on_compute: Callable[[], None] | None = None) -> StepResult:
        """Plans and computes one step; where several may be in flight, plans as many as fit and ends the oldest.

        Args:
            on_compute: called when all is planned and only the computation remains, which leaves Python to others.
        """
        if self._stages is not None or self._launcher is not None:
            try:
                return self._step_in_flight(on_layers, on_compute)
            except BaseException:
                # The runner has failed as a whole: nothing computes these steps any more.
                for plan, _ in self._in_flight:
                    self.scheduler.abandon(plan)
                self._in_flight.clear()
                raise
        plan = self.scheduler.schedule()
        result = StepResult(plan)
        if not plan.rows:
            return result
        batch, hook = self._batch(plan), self._hook(plan, on_layers)
        if on_compute is not None:
            on_compute()
        logits = self.runner.forward(batch, hook, self.layers_per_group)
        self._take(plan, logits, result)
        return result

    def _step_in_flight(self, on_layers: OnLayers | None, on_compute: Callable[[], None] | None) -> StepResult:
        merged = StepPlan()
        while len(self._in_flight) < self.max_steps_in_flight and not self._waits_for_host:
            plan = self.scheduler.schedule()
            merged.admitted += plan.admitted
            merged.reserved += plan.reserved
            merged.preempted += plan.preempted
            if not plan.rows:
                break
            self._begin(plan, on_layers)
        result = StepResult(merged)
        if self._in_flight:
            plan, handle = self._in_flight[0]
            if on_compute is not None:
                on_compute()
            merged.rows = plan.rows
            if self._launcher is not None:
                self._collect(self._launcher, plan, handle, result)
            else:
                assert self._stages is not None
                logits = self._stages.finish(handle)
                del self._in_flight[0]
                self._take(plan, logits, result)
        return result

    @property
    def _waits_for_host(self) -> bool:
        """Whether what the youngest step samples will be known only when it has ended."""
        return self._launcher is not None and bool(self._in_flight) and self._in_flight[-1][1].needs_host

    def _begin(self, plan: StepPlan, on_layers: OnLayers | None) -> None:
        hook = self._hook(plan, on_layers)
        if self._launcher is not None:
            step = self._launcher.launch(plan, self._samplers, hook, self.layers_per_group)
            self.scheduler.dispatch(plan, has_futures=not step.needs_host)
            self._in_flight.append((plan, step))
            return
        assert self._stages is not None
        handle = self._stages.begin(self._batch(plan), hook, self.layers_per_group)
        self.scheduler.dispatch(plan)
        self._in_flight.append((plan, handle))

    def _collect(self, launcher: StepLauncher, plan: StepPlan, step: LaunchedStep, result: StepResult) -> None:
        """Ends the oldest launched step."""
        tokens = launcher.collect(step)
        del self._in_flight[0]
        if step.logits is not None:
            self._take(plan, step.logits, result)
            return
        sampled: list[EngineSequence] = []
        for row in plan.rows:
            self.scheduler.advance(row)
            if row.samples:
                sampled.append(row.seq)
        for seq, token_id in zip(sampled, tokens.tolist(), strict=True):
            # Others ended, were released or held while this step was in flight: what it drew for them is dropped.
            if seq.state is SequenceState.RUNNING:
                self._append(seq, Sampled.of(token_id), result)

    def _batch(self, plan: StepPlan) -> ForwardBatch:
        rows, buffers = plan.rows, self.runner.buffers
        if plan.num_decode_rows == len(rows):
            return buffers.build_decode(
                [row.seq.token_ids[row.start] for row in rows],
                [row.start for row in rows],
                [row.seq.block_ids for row in rows],
                tuple([row.seq.tag for row in rows]),
            )
        return buffers.build([self._rows(row) for row in rows])

    def _hook(self, plan: StepPlan, on_layers: OnLayers | None) -> Callable[[int, int], None] | None:
        return None if on_layers is None else (lambda begin, end: on_layers(plan, begin, end))

    def _take(self, plan: StepPlan, logits: Tensor, result: StepResult) -> None:
        """What a computed step means for its sequences."""
        rows = plan.rows
        if plan.num_decode_rows == len(rows):
            running = [index for index, row in enumerate(rows) if row.seq.state is SequenceState.RUNNING]
            for row in rows:
                self.scheduler.advance(row)
            if running:
                self._sample(logits, running, [rows[index].seq for index in running], result)
            return
        sampling: list[EngineSequence] = []
        row_ids: list[int] = []
        index = 0
        for row in plan.rows:
            seq = row.seq
            samples = row.samples
            if seq.wants_prompt_logprobs:
                self._prompt_logprobs(row, logits[index : index + row.count])
                index += row.count
            elif samples:
                index += 1
            # Others were released or held while this step was in flight.
            if samples and seq.state is SequenceState.RUNNING:
                sampling.append(seq)
                row_ids.append(index - 1)
            self.scheduler.advance(row)
        if sampling:
            self._sample(logits, row_ids, sampling, result)

    def _rows(self, row: Row) -> SequenceRows:
        wants: Literal["none", "last", "all"] = (
            "all" if row.seq.wants_prompt_logprobs else "last" if row.samples else "none"
        )
        tokens = row.seq.token_ids[row.start : row.start + row.count]
        return SequenceRows(tokens, row.start, row.seq.block_ids, wants, row.seq.tag)

    def _sample(self, logits: Tensor, row_ids: list[int], sequences: list[EngineSequence], result: StepResult) -> None:
        samplers = [self._samplers[seq.key] for seq in sequences]
        if all(sampler.is_plain for sampler in samplers):
            positions = [len(seq.token_ids) for seq in sequences]
            drawn = draw_plain(logits, samplers, positions, row_ids)
            for seq, token_id in zip(sequences, drawn, strict=True):
                self._append(seq, Sampled.of(token_id), result)
            return
        rows: list[SamplerRow] = []
        for seq, sampler in zip(sequences, samplers, strict=True):
            written = () if sampler.processor is None else seq.token_ids[seq.num_prompt :]
            rows.append(SamplerRow(sampler, len(seq.token_ids), written))
        for seq, sampled in zip(sequences, sample(logits, rows, row_ids), strict=True):
            self._append(seq, sampled, result)

    def _append(self, seq: EngineSequence, sampled: Sampled, result: StepResult) -> None:
        token_id, logprobs, error = sampled
        if error:
            self.release(seq.key)
            output = RequestOutput(request_id=seq.key[0], attempt=seq.key[1], error=error)
            output.finish_reason = FinishReason.ERROR
            result.said.append(output)
            return
        reason = self.scheduler.append(seq, token_id)
        is_first = len(seq.token_ids) == seq.request.num_tokens + 1
        if reason is None and logprobs is None and not is_first:
            result.said.append((seq.key, token_id))
        else:
            result.said.append(self._output(seq, token_id, logprobs, reason))

    def _output(
        self, seq: EngineSequence, token_id: int, logprobs: TokenLogprobs | None, reason: FinishReason | None
    ) -> RequestOutput:
        request_id, attempt = seq.key
        output = RequestOutput(request_id=request_id, attempt=attempt, token_ids=[token_id], finish_reason=reason)
        if logprobs is not None:
            output.logprobs.append(logprobs)
        if len(seq.token_ids) == seq.request.num_tokens + 1:
            output.cached_tokens = seq.cached_tokens
            if seq.request.sampling.prompt_logprobs is not None:
                output.prompt_logprobs = [None, *seq.prompt_logprobs]
        if reason is FinishReason.STOP:
            output.stop_token_id = token_id
        if reason is not None:
            self._forget(seq.key)
        return output

    def _prompt_logprobs(self, row: Row, logits: Tensor) -> None:
        seq = row.seq
        num_top = seq.request.sampling.prompt_logprobs
        assert num_top is not None
        raw: npt.NDArray[np.float32] = logits.numpy(force=True)
        lse: npt.NDArray[np.float32] = ops.logits_lse(logits).numpy(force=True)
        for offset in range(row.count):
            following = row.start + offset + 1
            if following < seq.num_prompt:
                token_id = seq.token_ids[following]
                seq.prompt_logprobs.append(token_logprobs(raw[offset], lse[offset], token_id, num_top))

    def _forget(self, key: Key) -> None:
        self._samplers.pop(key, None)
