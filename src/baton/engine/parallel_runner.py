"""Several ranks that look like one runner: the driver's `ParallelRunner`, and `run_follower` for all other ranks.

    driver    Engine -> ParallelRunner.begin --step message--> every follower
                        ParallelRunner.finish: the driver's own part of the step, which ends in logits
    follower  run_follower: message -> its part of the step -> next message, until STOP or a broken group

The driver is the first rank of the last stage. A step is one message to each follower (`step_message.py`); ranks build
their batch from it alone and take steps in the order of the messages, so several steps may be under way, each in
another stage: `begin` returns at once, `finish` must be called in the order of `begin`. `forward` is both.

Failure: a rank that ends breaks its connections, the ranks that wait for it raise at once and end too; one that hangs
is found when a wait passes its deadline. Between steps a thread of the driver sends ticks, so that an idle instance
hears of a lost rank within `tick_s`; it calls `on_broken` once. After a failure every call raises that first error.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import torch
from torch import Tensor

from baton.engine.batch_buffers import BatchBuffers
from baton.engine.collectives import Pending
from baton.engine.core_board import at_work
from baton.engine.model import ForwardBatch, OnLayers
from baton.engine.parallel import Shard
from baton.engine.pipeline_figures import PipelineFigures
from baton.engine.runner import ModelRunner
from baton.engine.step_message import Message, MessageKind, StepBody, decode_step
from baton.engine.step_wire import MessageReceiver, batch_of, body_of, send_message
from baton.errors import BatonError, DeadlineError, UnavailableError

__all__ = ["FollowerOnLayers", "ParallelRunner", "PipelineFigures", "StepHandle", "run_follower"]

FollowerOnLayers = Callable[[StepBody, int, int], None]
"""Called with (step, begin, end) once this rank's layers begin..end-1 (numbered within its stage) are written."""


@dataclass(slots=True, eq=False)
class StepHandle:
    """A step under way; `ParallelRunner.finish` wants them in the order of `begin`."""

    body: StepBody
    on_layers: OnLayers | None
    sends: list[Pending]


class ParallelRunner:
    """The driver's runner, for `Engine`.

    Args:
        runner: this rank's part; made with the same settings on every rank.
        shard: this rank's place; it must be the driver.
        tick_s: between two looks at idle followers.
        on_broken: told once, on any thread, when the instance has lost a rank.

    Attributes:
        layout, kv, num_blocks, max_model_len, vocab_size, fingerprint, eos_token_ids, buffers: as `ModelRunner`'s;
            `kv` is the driver's own part.
        figures: what steps cost.
    """

    def __init__(
        self,
        runner: ModelRunner,
        shard: Shard,
        *,
        tick_s: float = 0.5,
        on_broken: Callable[[BatonError], None] | None = None,
    ) -> None:
        assert shard.partition.is_driver, f"rank {shard.partition.rank} is not the driver"
        self.runner = runner
        self.partition = shard.partition
        self.layout = runner.layout
        self.kv = runner.kv
        self.num_blocks = runner.num_blocks
        self.max_model_len = runner.max_model_len
        self.vocab_size = runner.vocab_size
        self.fingerprint = runner.fingerprint
        self.eos_token_ids = runner.eos_token_ids
        self.figures = PipelineFigures()
        # On the host: the message is made from it, and each rank puts its own copy on its own device.
        self.buffers = BatchBuffers(
            max_batch_tokens=runner.max_batch_tokens,
            max_batch_size=runner.max_batch_size,
            max_model_len=runner.max_model_len,
            block_size=runner.layout.block_size,
            device=torch.device("cpu"),
        )
        self._group = shard.group
        self._followers = [rank for rank in range(shard.group.size) if rank != shard.group.rank]
        self._on_broken = on_broken
        self._broken: BatonError | None = None
        self._under_way: deque[StepHandle] = deque()
        self._busy_since_s = 0.0
        self._num_messages = 0
        self._stopped = False
        self._is_warming_up = False
        # Held while a message is posted, so that ticks and steps do not mix.
        self._control = threading.Lock()
        self._breaking = threading.Lock()
        self._tick_s = tick_s
        self._stopping = threading.Event()
        self._ticker = threading.Thread(target=self._tick_on, name="baton-ticks", daemon=True)
        if self._followers:
            self._ticker.start()

    # ------------------------------------------------------------ steps

    @property
    def max_steps_in_flight(self) -> int:
        """How many steps keep all stages busy."""
        return self.partition.pipeline_parallel

    def forward(self, batch: ForwardBatch, on_layers: OnLayers | None = None, layers_per_group: int = 4) -> Tensor:
        """`begin` and `finish` in one."""
        return self.finish(self.begin(batch, on_layers, layers_per_group))

    def begin(self, batch: ForwardBatch, on_layers: OnLayers | None = None, layers_per_group: int = 4) -> StepHandle:
        """Tell every rank of a step; the batch's buffers may be used again at once.

        Args:
            batch: from `buffers.build`.
            on_layers: told about the driver's own layers, during `finish`.

        Raises:
            DeadlineError, UnavailableError: a rank is gone or hangs; the instance has ended.
        """
        body = body_of(batch, self.layout.block_size, layers_per_group)
        encoded = body.encode()
        # What is computed here is what went out.
        body = self._decode(encoded)
        handle = StepHandle(body, on_layers, [])
        if not self._under_way:
            self._busy_since_s = time.perf_counter()
        # Before the message goes out, so that no tick is sent behind it.
        self._under_way.append(handle)
        handle.sends += self._post(MessageKind.STEP, encoded)
        assert self.runner.stage is not None
        try:
            self.runner.stage.expect(len(body.token_ids))
        except (DeadlineError, UnavailableError) as error:
            raise self._break(error) from error
        return handle

    def finish(self, handle: StepHandle) -> Tensor:
        """Compute the driver's part of the oldest step under way.

        Returns:
            fp32 [R, vocab_size] on the driver's device.

        Raises:
            DeadlineError, UnavailableError: a rank is gone or hangs; the instance has ended.
        """
        assert self._under_way, "no step is under way"
        assert self._under_way[0] is handle, "steps end in the order in which they began"
        assert self.runner.stage is not None
        self._check()
        begin_s, waited_s = time.perf_counter(), self.runner.stage.wait_s
        try:
            logits = self.runner.forward(
                batch_of(handle.body, self.runner.device), handle.on_layers, handle.body.layers_per_group
            )
        except (DeadlineError, UnavailableError) as error:
            raise self._break(error) from error
        self._wait(handle.sends)
        self._under_way.popleft()
        end_s = time.perf_counter()
        self.figures.steps += 1
        self.figures.step_s += end_s - begin_s
        self.figures.bubble_s += self.runner.stage.wait_s - waited_s
        self.figures.busy_s += end_s - self._busy_since_s
        self._busy_since_s = end_s
        return logits

    def warm_up(self) -> bool | None:
        """`ModelRunner.warm_up` on all ranks together; what it says of the driver's layers."""
        assert not self._under_way, "warm up comes before steps"
        self._is_warming_up = True
        sends = self._post(MessageKind.WARM_UP)
        try:
            result = self.runner.warm_up()
        except (DeadlineError, UnavailableError) as error:
            raise self._break(error) from error
        self._wait(sends)
        self._is_warming_up = False
        return result

    def stop(self) -> None:
        """Let all followers end and close the group; what steps under way compute is lost. Again: nothing happens."""
        if self._stopped:
            return
        self._stopped = True
        self._stopping.set()
        # A rank that has gone already needs no telling.
        with suppress(DeadlineError, UnavailableError):
            while self._under_way:
                self.finish(self._under_way[0])
            self._wait(self._post(MessageKind.STOP))
        self._group.close()
        if self._ticker.ident is not None and self._ticker is not threading.current_thread():
            self._ticker.join(self._group.deadline_s)

    def abandon(self, error: BatonError) -> None:
        """End the instance because of what is known from elsewhere: whoever waits for a rank raises `error`."""
        self._break(error)

    # ------------------------------------------------------------ inside

    def _decode(self, encoded: bytes) -> StepBody:
        return decode_step(
            encoded, num_blocks=self.num_blocks, vocab_size=self.vocab_size, block_size=self.layout.block_size
        )

    def _post(self, kind: MessageKind, body: bytes = b"") -> list[Pending]:
        with self._control:
            self._check()
            try:
                return self._post_locked(kind, body)
            except (DeadlineError, UnavailableError) as error:
                raise self._break(error) from error

    def _post_locked(self, kind: MessageKind, body: bytes = b"") -> list[Pending]:
        if kind is not MessageKind.TICK:
            self._num_messages += 1
        return send_message(self._group, self._followers, Message(kind, self._num_messages, body))

    def _wait(self, sends: list[Pending]) -> None:
        try:
            for send in sends:
                send.wait()
        except (DeadlineError, UnavailableError) as error:
            raise self._break(error) from error

    def _tick_on(self) -> None:
        while not self._stopping.wait(self._tick_s):
            try:
                with self._control:
                    if self._broken is not None or self._stopping.is_set():
                        return
                    # A step under way finds a lost rank by itself, and busy ranks do not listen.
                    if self._under_way or self._is_warming_up:
                        continue
                    for send in self._post_locked(MessageKind.TICK):
                        send.wait()
            except (DeadlineError, UnavailableError) as error:
                if not self._stopping.is_set():
                    self._break(error)
                return

    def _check(self) -> None:
        if self._broken is not None:
            raise self._broken

    def _break(self, error: BatonError) -> BatonError:
        """Remember the first failure, end the instance, and give that failure back."""
        with self._breaking:
            if self._broken is not None:
                return self._broken
            self._broken = error
        self._stopping.set()
        self._group.leave_reason(error.message)
        self._group.close()
        if self._on_broken is not None:
            self._on_broken(error)
        return error


def run_follower(
    runner: ModelRunner,
    shard: Shard,
    *,
    on_layers: FollowerOnLayers | None = None,
    figures: PipelineFigures | None = None,
) -> None:
    """Do what the driver says until it says stop. Blocks; on return or raise the group is closed.

    Args:
        runner: this rank's part.
        on_layers: told about this rank's layers as they are written.
        figures: filled with what steps cost here, for other threads to read.

    Raises:
        DeadlineError, UnavailableError: another rank is gone or hangs, or sent what cannot be: this rank must end too.
    """
    group, driver = shard.group, shard.partition.driver_rank
    figures = figures if figures is not None else PipelineFigures()
    expected = 0
    with shard.reporting():
        messages = MessageReceiver(group, driver)
        while True:
            message = messages.receive()
            if message.kind is not MessageKind.TICK:
                expected += 1
            if message.step != expected:
                raise UnavailableError(f"rank {group.rank}: message {message.step} came where {expected} was due")
            if message.kind is MessageKind.STOP:
                group.close()
                return
            if message.kind is MessageKind.STEP:
                begin_s, waited_s = time.perf_counter(), _waited_s(runner)
                with at_work():
                    _follow(runner, message.body, on_layers)
                figures.bubble_s += _waited_s(runner) - waited_s
                figures.step_s += time.perf_counter() - begin_s
                figures.steps += 1
            elif message.kind is MessageKind.WARM_UP:
                runner.warm_up()


def _waited_s(runner: ModelRunner) -> float:
    """Seconds that this rank has waited for activations."""
    assert runner.stage is not None, "a follower is one of several ranks"
    return runner.stage.wait_s


def _follow(runner: ModelRunner, encoded: bytes, on_layers: FollowerOnLayers | None) -> None:
    body = decode_step(
        encoded, num_blocks=runner.num_blocks, vocab_size=runner.vocab_size, block_size=runner.layout.block_size
    )
    hook = None if on_layers is None else (lambda begin, end: on_layers(body, begin, end))
    runner.forward(batch_of(body, runner.device), hook, body.layers_per_group)
