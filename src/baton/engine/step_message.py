"""One step as bytes: what the driver tells the other ranks. Plain numpy, no pickle, every length checked.

    offset 0   magic "BtnS"       4 bytes
           4   version            uint16
           6   kind               uint16, `MessageKind`
           8   step               uint64, counts up by one per message that is not a tick
          16   length of the body uint32, bytes
          20   body

    body of STEP, little-endian int32 throughout:
        S, T, R, B            sequences, tokens, logit rows, blocks in all
        block_size, layers_per_group
        counts [S]            tokens of each sequence in this step
        context_lens [S]      tokens of each sequence once the step is done
        tags [S]              a number of each sequence for `on_layers`, 0 where there is nothing to tell
        blocks [B]            block ids, sequence after sequence, `ceil(context_len / block_size)` each
        token_ids [T], logit_rows [R]

    TICK, WARM_UP, STOP have no body.

Positions and slots are not sent: they follow from the rest. Ranks decode what their own driver encoded, but a damaged
message must end the instance with a clear error, never in a write outside the pool.
"""

from __future__ import annotations

import enum
import itertools
import struct
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from baton.errors import UnavailableError

__all__ = ["HEADER_BYTES", "MAX_BODY_BYTES", "Message", "MessageKind", "StepBody", "decode_header", "decode_step"]

HEADER = struct.Struct("<4sHHQI")
HEADER_BYTES = HEADER.size
MAX_BODY_BYTES = 1 << 28
_MAGIC = b"BtnS"
_VERSION = 1
_FIXED = 6

Ints = npt.NDArray[np.int32]


class MessageKind(enum.IntEnum):
    """What a message asks of a rank."""

    STEP = 1
    TICK = 2
    WARM_UP = 3
    STOP = 4


@dataclass(frozen=True, slots=True)
class Message:
    """One message of the driver. `step` numbers it; `body` is opaque here."""

    kind: MessageKind
    step: int = 0
    body: bytes = b""

    def encode(self) -> bytes:
        """Header and body."""
        assert len(self.body) <= MAX_BODY_BYTES, f"a message of {len(self.body)} bytes"
        return HEADER.pack(_MAGIC, _VERSION, self.kind, self.step, len(self.body)) + self.body


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepBody:
    """What a step computes.

    Attributes:
        counts: int32 [S], tokens of each sequence in this step, at least one each.
        context_lens: int32 [S], tokens in the cache once the step is done.
        tags: int32 [S], see `ForwardBatch`.
        blocks: int32 [B], the blocks that hold them, sequence after sequence.
        token_ids: int32 [T].
        logit_rows: int32 [R], tokens (indices into T) whose logits are wanted, ascending.
        block_size: tokens per block.
        layers_per_group: between two calls of `on_layers`.
    """

    counts: Ints
    context_lens: Ints
    tags: Ints
    blocks: Ints
    token_ids: Ints
    logit_rows: Ints
    block_size: int
    layers_per_group: int

    def encode(self) -> bytes:
        """The body of a STEP message."""
        sizes = (len(self.counts), len(self.token_ids), len(self.logit_rows), len(self.blocks))
        fixed = np.array([*sizes, self.block_size, self.layers_per_group], dtype="<i4")
        parts = (fixed, self.counts, self.context_lens, self.tags, self.blocks, self.token_ids, self.logit_rows)
        return np.concatenate(parts).astype("<i4", copy=False).tobytes()

    def block_table(self) -> Ints:
        """int32 [S, widest], the blocks of each sequence; zeros behind them."""
        widths = _blocks_for(self.context_lens, self.block_size)
        table = np.zeros((len(widths), int(widths.max())), dtype=np.int32)
        table[np.arange(table.shape[1]) < widths[:, None]] = self.blocks
        return table

    def query_start(self) -> Ints:
        """int32 [S + 1], where each sequence's tokens begin."""
        starts = np.zeros(len(self.counts) + 1, dtype=np.int32)
        np.cumsum(self.counts, out=starts[1:])
        return starts

    def positions(self) -> Ints:
        """int32 [T], counted from the prompt's start."""
        first = np.repeat(self.context_lens - self.counts - self.query_start()[:-1], self.counts)
        return (first + np.arange(len(self.token_ids), dtype=np.int32)).astype(np.int32)

    def slots(self, block_table: Ints) -> npt.NDArray[np.int64]:
        """int64 [T], `block_id * block_size + offset`, from what `block_table` gave."""
        block, offset = np.divmod(self.positions(), self.block_size)
        sequence = np.repeat(np.arange(len(self.counts)), self.counts)
        return block_table[sequence, block].astype(np.int64) * self.block_size + offset


def decode_header(data: bytes | memoryview) -> tuple[MessageKind, int, int]:
    """(kind, step, bytes of the body) of a message's first `HEADER_BYTES`.

    Raises:
        UnavailableError: not such a message, or of another version.
    """
    if len(data) < HEADER_BYTES:
        raise UnavailableError(f"step message: {len(data)} bytes, a header has {HEADER_BYTES}")
    magic, version, kind, step, length = HEADER.unpack_from(data)
    if magic != _MAGIC or version != _VERSION:
        raise UnavailableError(
            f"step message: begins with {magic!r} version {version}; expected {_MAGIC!r} version {_VERSION}"
        )
    if kind not in MessageKind._value2member_map_:
        raise UnavailableError(f"step message: kind {kind} is unknown")
    if length > MAX_BODY_BYTES:
        raise UnavailableError(f"step message: {length} bytes, more than the limit of {MAX_BODY_BYTES}")
    return MessageKind(kind), step, length


def decode_step(body: bytes | memoryview, *, num_blocks: int, vocab_size: int, block_size: int) -> StepBody:
    """The content of a STEP message.

    Args:
        num_blocks, vocab_size, block_size: of this rank; ids beyond them are refused.

    Raises:
        UnavailableError: lengths, ids or counts that cannot be.
    """
    if len(body) % 4 or len(body) < 4 * _FIXED:
        raise _bad(f"{len(body)} bytes")
    values = np.frombuffer(body, dtype="<i4").astype(np.int32, copy=False)
    num_sequences, num_tokens, num_rows, num_listed, given_block_size, layers_per_group = (
        int(value) for value in values[:_FIXED]
    )
    sizes = (num_sequences, num_sequences, num_sequences, num_listed, num_tokens, num_rows)
    if min(num_sequences, num_tokens, num_listed, layers_per_group) < 1 or num_rows < 0:
        raise _bad(f"sizes {sizes}")
    if _FIXED + sum(sizes) != len(values):
        raise _bad(f"{len(values)} numbers, sizes {sizes} ask for {_FIXED + sum(sizes)}")
    if given_block_size != block_size:
        raise _bad(f"block size {given_block_size}, this rank has {block_size}")
    ends = np.cumsum([_FIXED, *sizes])
    counts, contexts, tags, blocks, tokens, rows = (values[begin:end] for begin, end in itertools.pairwise(ends))
    if counts.min() < 1 or int(counts.sum(dtype=np.int64)) != num_tokens or bool((contexts < counts).any()):
        raise _bad("token counts do not fit the contexts")
    if int(_blocks_for(contexts, block_size).sum(dtype=np.int64)) != num_listed:
        raise _bad(f"{num_listed} blocks do not cover the contexts")
    if blocks.min() < 0 or blocks.max() >= num_blocks:
        raise _bad(f"a block id beyond the pool of {num_blocks}")
    if tokens.min() < 0 or tokens.max() >= vocab_size:
        raise _bad(f"a token id beyond the vocabulary of {vocab_size}")
    if num_rows and (rows[0] < 0 or rows[-1] >= num_tokens or bool((rows[1:] <= rows[:-1]).any())):
        raise _bad("logit rows are not ascending within the batch")
    return StepBody(
        counts=counts,
        context_lens=contexts,
        tags=tags,
        blocks=blocks,
        token_ids=tokens,
        logit_rows=rows,
        block_size=block_size,
        layers_per_group=layers_per_group,
    )


def _blocks_for(context_lens: Ints, block_size: int) -> Ints:
    return -(-context_lens // block_size)


def _bad(what: str) -> UnavailableError:
    return UnavailableError(f"step message is damaged: {what}")
