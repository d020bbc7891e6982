"""What changes the logits of running requests before tokens are drawn, as tables on the device.

A request has a slot, a row of every table, written once when it starts (`write`) and kept true by `ops.count_tokens` as
tokens come; `ops.process_logits` reads it. Tables keep their memory, so CUDA graphs can hold their addresses. Who gives
slots to requests must not write one that a launched step still reads from another stream.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["LogitsTables"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitsTables:
    """Tables of S slots for a vocabulary of V tokens; bit t % 32 of word t // 32 stands for token t.

    Attributes:
        allowed: int32 [S, ceil(V / 32)], bits of tokens that may be drawn; read where `is_restricted`.
        prompt: int32 [S, ceil(V / 32)], bits of tokens in the prompt.
        counts: int32 [S, V], how often the output has each token.
        penalties: fp32 [S, 3]: repetition, frequency, presence; off: 1, 0, 0.
        bias_ids, bias: int32 and fp32 [S, B], distinct tokens and what is added to them; the first `num_bias` count.
        end_ids: int32 [S, E], masked until `min_tokens` are out; the first `num_ends` count.
        is_restricted, num_bias, num_ends, min_tokens, num_outputs: int32 [S].
    """

    allowed: Tensor
    prompt: Tensor
    counts: Tensor
    penalties: Tensor
    bias_ids: Tensor
    bias: Tensor
    end_ids: Tensor
    is_restricted: Tensor
    num_bias: Tensor
    num_ends: Tensor
    min_tokens: Tensor
    num_outputs: Tensor

    @classmethod
    def empty(
        cls, num_slots: int, vocab: int, *, max_bias: int, max_ends: int, device: torch.device | str = "cpu"
    ) -> LogitsTables:
        """Tables in which no slot changes anything."""

        def zeros(*shape: int, dtype: torch.dtype = torch.int32) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=device)

        words = -(-vocab // 32)
        penalties = zeros(num_slots, 3, dtype=torch.float32)
        penalties[:, 0] = 1.0
        return cls(
            allowed=zeros(num_slots, words),
            prompt=zeros(num_slots, words),
            counts=zeros(num_slots, vocab),
            penalties=penalties,
            bias_ids=zeros(num_slots, max_bias),
            bias=zeros(num_slots, max_bias, dtype=torch.float32),
            end_ids=zeros(num_slots, max_ends),
            is_restricted=zeros(num_slots),
            num_bias=zeros(num_slots),
            num_ends=zeros(num_slots),
            min_tokens=zeros(num_slots),
            num_outputs=zeros(num_slots),
        )

    @property
    def vocab(self) -> int:
        return self.counts.shape[1]

    def write(
        self,
        slot: int,
        *,
        allowed_token_ids: Sequence[int] | None = None,
        logit_bias: Sequence[tuple[int, float]] = (),
        end_ids: Sequence[int] = (),
        min_tokens: int = 0,
        repetition_penalty: float = 1.0,
        frequency_penalty: float = 0.0,
        presence_penalty: float = 0.0,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Give `slot` to a request; `output_token_ids` is what it has written before, where it was interrupted.

        Raises:
            ValueError: more biases or ends than the tables have room for.
        """
        for name, given, room in (
            ("logit_bias", len(logit_bias), self.bias.shape[1]),
            ("end_ids", len(end_ids), self.end_ids.shape[1]),
        ):
            if given > room:
                raise ValueError(f"{name} has {given} entries, the tables have room for {room}")
        self.allowed[slot] = self._bits(allowed_token_ids or ())
        self.is_restricted[slot] = allowed_token_ids is not None
        self.prompt[slot] = self._bits(prompt_token_ids)
        self.counts[slot] = torch.bincount(_ids(output_token_ids), minlength=self.vocab).int()
        self.num_outputs[slot] = len(output_token_ids)
        self.penalties[slot] = torch.tensor([repetition_penalty, frequency_penalty, presence_penalty])
        self.bias_ids[slot, : len(logit_bias)] = _ids(token for token, _ in logit_bias).int()
        self.bias[slot, : len(logit_bias)] = torch.tensor([bias for _, bias in logit_bias])
        self.num_bias[slot] = len(logit_bias)
        self.end_ids[slot, : len(end_ids)] = _ids(end_ids).int()
        self.num_ends[slot] = len(end_ids)
        self.min_tokens[slot] = min_tokens

    def _bits(self, token_ids: Sequence[int]) -> Tensor:
        flags = torch.zeros(self.allowed.shape[1] * 32, dtype=torch.int64)
        flags[_ids(token_ids)] = 1
        # The top bit is the sign: as int64 first.
        return (flags.view(-1, 32) << torch.arange(32)).sum(1).to(torch.int32)


def _ids(token_ids: Iterable[int]) -> Tensor:
    return torch.tensor(list(token_ids), dtype=torch.int64)
