"""Step messages on their way: bytes over a `RankGroup`, batches to bodies and back.

A message travels as a first piece of fixed size, which most steps fit, and the rest, if any, as a second.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from baton.engine.collectives import Pending, RankGroup
from baton.engine.model import ForwardBatch
from baton.engine.step_message import HEADER_BYTES, Message, MessageKind, StepBody, decode_header

__all__ = ["MessageReceiver", "batch_of", "body_of", "send_message"]

_FRAME_BYTES = 4096


class MessageReceiver:
    """The driver's messages, one after the other.

    Room for the next one is made before this one is handed out: it arrives while the step is computed.
    """

    def __init__(self, group: RankGroup, driver: int) -> None:
        self._group = group
        self._driver = driver
        self._next = self._begin()

    def receive(self) -> Message:
        """The next message; the driver's ticks keep the wait below the deadline."""
        first = self._next.wait().numpy().tobytes()
        kind, step, length = decode_header(first)
        body = first[HEADER_BYTES : HEADER_BYTES + length]
        rest_bytes = HEADER_BYTES + length - _FRAME_BYTES
        if rest_bytes > 0:
            rest = torch.empty(rest_bytes, dtype=torch.uint8)
            self._group.receive(rest, self._driver, "control").wait()
            body += rest.numpy().tobytes()
        if kind is not MessageKind.STOP:
            self._next = self._begin()
        return Message(kind, step, body)

    def _begin(self) -> Pending:
        return self._group.receive(torch.empty(_FRAME_BYTES, dtype=torch.uint8), self._driver, "control")


def send_message(group: RankGroup, ranks: Sequence[int], message: Message) -> list[Pending]:
    """Starts to send `message` to each of `ranks`; does not wait for them."""
    frames = _frames(message.encode())
    return [group.send(frame, rank, "control") for rank in ranks for frame in frames]


def _frames(encoded: bytes) -> list[Tensor]:
    """`encoded` cut as `_receive` reads it."""
    first = torch.zeros(_FRAME_BYTES, dtype=torch.uint8)
    data = torch.frombuffer(bytearray(encoded), dtype=torch.uint8)
    first[: len(data)] = data[:_FRAME_BYTES]
    return [first] if len(data) <= _FRAME_BYTES else [first, data[_FRAME_BYTES:]]


def body_of(batch: ForwardBatch, block_size: int, layers_per_group: int) -> StepBody:
    """A batch on the host as what is sent: a copy, so that the batch's buffers may be used again."""
    contexts = batch.context_lens.numpy().astype(np.int32)
    widths = -(-contexts // block_size)
    tables = batch.block_tables.numpy()
    return StepBody(
        counts=np.diff(batch.query_start.numpy()).astype(np.int32),
        context_lens=contexts,
        tags=np.array(batch.tags or (0,) * len(contexts), dtype=np.int32),
        blocks=tables[np.arange(tables.shape[1]) < widths[:, None]].astype(np.int32),
        token_ids=batch.token_ids.numpy().astype(np.int32),
        logit_rows=batch.logit_rows.numpy().astype(np.int32),
        block_size=block_size,
        layers_per_group=layers_per_group,
    )


def batch_of(body: StepBody, device: torch.device) -> ForwardBatch:
    """What `body_of` was given, anew, on `device`."""
    table = body.block_table()
    return ForwardBatch(
        token_ids=torch.from_numpy(body.token_ids.astype(np.int64)).to(device),
        positions=torch.from_numpy(body.positions()).to(device),
        slots=torch.from_numpy(body.slots(table)).to(device),
        block_tables=torch.from_numpy(table).to(device),
        query_start=torch.from_numpy(body.query_start()).to(device),
        context_lens=torch.from_numpy(body.context_lens.copy()).to(device),
        logit_rows=torch.from_numpy(body.logit_rows.astype(np.int64)).to(device),
    )
