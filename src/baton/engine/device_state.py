"""What the device knows of running sequences, and how a packed step becomes a batch there.

Per slot (`sequence_slots.py`), and one more, the scratch slot, for padding rows:

    tables        int32 [num_slots + 1, max_blocks]     blocks; written only with what a step brings
    last_tokens   int64 [num_slots + 1]                 the token drawn last: the next step's input
    samplings     int64 [num_slots + 1, SAMPLING_WORDS] how tokens are drawn

Everything here only enqueues, in the order of the steps, so a step finds what the one before has drawn without anybody
waiting. All buffers are allocated once, and `decode_batch` and `draw_decode` can be recorded into a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor

from baton.engine.model import ForwardBatch
from baton.engine.step_packing import DECODE_FIELDS, Field, PackedStep, aligned
from baton.kernels import ops

__all__ = ["SAMPLING_WORDS", "DeviceState"]

SAMPLING_WORDS = len(ops.pack_sampling(seed=0, temperature=0.0, top_k=0, top_p=1.0, min_p=0.0)) // 8
"""64-bit words of one `pack_sampling`."""


class DeviceState:
    """The tables of one engine.

    Args:
        num_slots: without the scratch slot.
        max_blocks: blocks of the longest sequence.
        block_size: tokens per block.
        scratch_block: belongs to no sequence.
        num_words: of the largest packed step.
        max_rows: of the largest decode step.
    """

    def __init__(
        self,
        *,
        num_slots: int,
        max_blocks: int,
        block_size: int,
        scratch_block: int,
        num_words: int,
        max_rows: int,
        device: torch.device,
    ) -> None:
        self._block_size = block_size
        self.words = torch.zeros(num_words, dtype=torch.int32, device=device)
        self.last_tokens = torch.zeros(num_slots + 1, dtype=torch.int64, device=device)
        self._tables = torch.zeros((num_slots + 1, max_blocks), dtype=torch.int32, device=device)
        self._tables[num_slots] = scratch_block
        self._samplings = torch.zeros((num_slots + 1, SAMPLING_WORDS), dtype=torch.int64, device=device)
        self._workspace = ops.draw_workspace(max_rows, device)
        self._drawn = torch.zeros(max_rows, dtype=torch.int64, device=device)
        self._counting = torch.arange(max_rows + 1, dtype=torch.int32, device=device)
        self._rows = torch.arange(max_rows, dtype=torch.int64, device=device)

    # ------------------------------------------------------------ any step

    def update(self, step: PackedStep) -> None:
        """Takes in what is new in a step, before anything else of it."""
        if step.entries[1]:
            entries = self._field(step.entries).long()
            self._tables.view(-1).index_copy_(0, entries, self._field(step.blocks))
        if step.new_slots[1]:
            samplings = self._field(step.samplings).view(torch.int64).view(-1, SAMPLING_WORDS)
            self._samplings.index_copy_(0, self._field(step.new_slots).long(), samplings)

    def batch(self, step: PackedStep) -> ForwardBatch:
        """The batch of a step that is no decode step."""
        fields = step.token_fields
        assert fields is not None
        positions = self._field(fields.positions)
        token_slots = self._field(fields.token_slots).long()
        blocks = self._tables[token_slots, (positions // self._block_size).long()]
        return ForwardBatch(
            token_ids=self._known(self._field(fields.tokens), token_slots),
            positions=positions,
            slots=self._kv_slots(blocks, positions),
            block_tables=self._tables[:, : fields.table_width].index_select(0, self._field(fields.slots).long()),
            query_start=self._field(fields.query_start),
            context_lens=self._field(fields.context_lens),
            logit_rows=self._field(fields.logit_rows).long(),
            query_rows=fields.query_rows,
        )

    def draw(self, step: PackedStep, logits: Tensor) -> int:
        """Draws a token from each row of logits [R, V], `drawn` gives them; returns R, 0 where the host draws."""
        fields = step.token_fields
        assert fields is not None
        num_tokens = fields.drawn_slots[1]
        if num_tokens:
            self._draw(logits, self._field(fields.drawn_slots).long(), self._field(fields.drawn_positions).long())
        return num_tokens

    # ------------------------------------------------------------ decode steps, of `bucket` rows

    def clear_decode(self, bucket: int, scratch_slot: int) -> None:
        """Makes the decode fields those of a step of padding rows only."""
        fields = self._decode_fields(bucket)
        fields.zero_()
        fields[0] = scratch_slot
        fields[3] = self._tables.numel() - 1
        fields[4] = self._tables[-1, -1]

    def decode_batch(self, bucket: int) -> ForwardBatch:
        """The batch that the decode fields describe; takes in their new blocks."""
        slots, positions, tokens, entries, blocks = self._decode_fields(bucket)
        self._tables.view(-1).index_copy_(0, entries.long(), blocks)
        slots = slots.long()
        tables = self._tables.index_select(0, slots)
        own_blocks = tables.gather(1, (positions // self._block_size).long().unsqueeze(1)).squeeze(1)
        return ForwardBatch(
            token_ids=self._known(tokens, slots),
            positions=positions,
            slots=self._kv_slots(own_blocks, positions),
            block_tables=tables,
            query_start=self._counting[: bucket + 1],
            context_lens=positions + 1,
            logit_rows=self._rows[:bucket],
            query_rows=(1, 1),
        )

    def draw_decode(self, bucket: int, logits: Tensor) -> None:
        """Draws every row's token; `drawn` gives them."""
        slots, positions = self._decode_fields(bucket)[:2]
        self._draw(logits, slots.long(), positions.long() + 1)

    def drawn(self, num_rows: int) -> Tensor:
        """int64 [num_rows], of the last draw."""
        return self._drawn[:num_rows]

    # ------------------------------------------------------------ inside

    def _field(self, field: Field) -> Tensor:
        begin, size = field
        return self.words[begin : begin + size]

    def _decode_fields(self, bucket: int) -> Tensor:
        stride = aligned(bucket)
        return self.words[: DECODE_FIELDS * stride].view(DECODE_FIELDS, stride)[:, :bucket]

    def _known(self, tokens: Tensor, slots: Tensor) -> Tensor:
        """Tokens that the host sent, and for others the one drawn last for their slot."""
        return torch.where(tokens >= 0, tokens.long(), self.last_tokens.index_select(0, slots))

    def _kv_slots(self, blocks: Tensor, positions: Tensor) -> Tensor:
        return blocks.long() * self._block_size + positions % self._block_size

    def _draw(self, logits: Tensor, slots: Tensor, positions: Tensor) -> None:
        tokens = self._drawn[: slots.shape[0]]
        samplings = self._samplings.index_select(0, slots)
        ops.draw_tokens_into(logits, self._rows[: slots.shape[0]], samplings, positions, tokens, self._workspace)
        # The row behind is computed before the host has seen that there is no number; it must be some token.
        self.last_tokens.index_copy_(0, slots, tokens.clamp_min(0))
