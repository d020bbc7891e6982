"""Makes one rank's part of a model out of the plain one: the sharding rules, applied from outside.

    qkv, gate_up   by columns: each rank computes its heads, its part of the inner size; nothing to exchange
    o, down        by rows: each rank multiplies what it has, the products are summed over the stage's ranks
    embedding      by vocabulary: each rank looks up its own tokens, zeros elsewhere, summed over the ranks
    head           by vocabulary: each rank's logits go to the stage's first rank, only of rows that are sampled

`weights.load_weights` reads a rank's slices; here they get the exchange around them. The bias of o and down is loaded
on tensor rank 0 alone, so it is added once. Sums run in rank order (`collectives.py`): the same bits for every batch.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from baton.engine.collectives import Pending, RankGroup
from baton.engine.linear import Embedding, LinearLike
from baton.engine.model_config import ModelConfig
from baton.engine.partition import Partition, plan_layers
from baton.engine.weights import ModelWeights

__all__ = [
    "RowParallelLinear",
    "Shard",
    "Stage",
    "VocabParallelEmbedding",
    "VocabParallelHead",
    "local_linear",
    "parallelize",
]


_SENDS_UNDER_WAY = 8


@dataclass(frozen=True, slots=True)
class Shard:
    """One rank's place in its instance.

    Attributes:
        partition: what it holds.
        group: how it reaches the others.
        load_s: how long the ranks wait for each other while they load their weights.
    """

    partition: Partition
    group: RankGroup
    load_s: float = 600.0

    @classmethod
    def connect(
        cls,
        config: ModelConfig,
        *,
        tensor_parallel: int,
        pipeline_parallel: int,
        rank: int,
        store_host: str,
        store_port: int,
        own_host: str = "127.0.0.1",
        name: str = "instance",
        deadline_s: float = 30.0,
        connect_s: float = 60.0,
        layers_per_stage: Sequence[int] | None = None,
    ) -> Shard:
        """Meet the instance's other ranks, which call this with the same arguments but `rank` and `own_host`.

        Args:
            deadline_s: of each wait for another rank; longer than the longest step takes on all stages together.
            layers_per_stage: None balances the stages by estimated cost for decode, empty splits the layers evenly.

        See `Partition.of` and `RankGroup.connect` for the others.

        Raises:
            ConfigError: the model cannot be split so.
            UnavailableError: the other ranks did not show up.
        """
        if layers_per_stage is None:
            layers_per_stage = plan_layers(config, pipeline_parallel)
        partition = Partition.of(
            config,
            tensor_parallel=tensor_parallel,
            pipeline_parallel=pipeline_parallel,
            rank=rank,
            layers_per_stage=layers_per_stage,
        )
        group = RankGroup.connect(
            store_host=store_host,
            store_port=store_port,
            rank=rank,
            size=partition.num_ranks,
            tensor_ranks=partition.tensor_ranks,
            own_host=own_host,
            name=name,
            deadline_s=deadline_s,
            connect_s=connect_s,
        )
        return cls(partition, group)

    @contextmanager
    def reporting(self) -> Iterator[None]:
        """Around all that a rank does: what it raises is told to the others, whose own errors then give the reason."""
        try:
            yield
        except BaseException as error:
            self.group.leave_reason(str(error) or type(error).__name__)
            self.group.close()
            raise


class Stage:
    """What comes from the stage before and goes to the one after: hidden rows of a step's every token.

    Each rank talks to the rank of its own tensor rank, so activations cross between stages on TP connections at once.

    Attributes:
        wait_s: seconds spent waiting for the stage before.
    """

    def __init__(self, shard: Shard, *, hidden_size: int, dtype: torch.dtype, device: torch.device) -> None:
        self.wait_s = 0.0
        self._partition = shard.partition
        self._group = shard.group
        self._hidden_size = hidden_size
        self._dtype = dtype
        self._device = device
        self._sends: deque[Pending] = deque()
        self._expected: deque[Pending] = deque()

    @property
    def is_last(self) -> bool:
        """Whether logits come out here."""
        return self._partition.is_last_stage

    def expect(self, num_tokens: int) -> None:
        """A later `receive` will ask for [T, H]: makes room now, in the order of those calls.

        What is sent before the receiver has room waits at the sender, whose cores are busy with its next step by then.
        """
        if not self._partition.is_first_stage and self._group.device is None:
            self._expected.append(self._begin_receive(num_tokens))

    def receive(self, num_tokens: int) -> Tensor | None:
        """[T, H] of the stage before; None on the first stage. Raises as `collectives.py` says."""
        if self._partition.is_first_stage:
            return None
        if self._group.device is not None:
            room = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype, device=self._device)
            return self._group.device.receive(room)
        pending = self._expected.popleft() if self._expected else self._begin_receive(num_tokens)
        assert pending.tensor.shape[0] == num_tokens, f"{pending.tensor.shape[0]} rows expected, {num_tokens} wanted"
        begin_s = time.perf_counter()
        hidden = pending.wait()
        self.wait_s += time.perf_counter() - begin_s
        return hidden.to(self._device)

    def _begin_receive(self, num_tokens: int) -> Pending:
        hidden = torch.empty((num_tokens, self._hidden_size), dtype=self._dtype)
        return self._group.receive(hidden, self._partition.rank - self._partition.tensor_parallel, "activations")

    def send(self, hidden: Tensor) -> None:
        """Hands [T, H] to the next stage, which may be busy: only the send before the last few is waited for."""
        if self._group.device is not None:
            self._group.device.send(hidden)
            return
        peer = self._partition.rank + self._partition.tensor_parallel
        self._sends.append(self._group.send(hidden, peer, "activations"))
        while len(self._sends) > _SENDS_UNDER_WAY:
            self._sends.popleft().wait()


class RowParallelLinear:
    """A linear layer whose input features are split over the stage's ranks: local product, then the sum."""

    def __init__(self, local: LinearLike, group: RankGroup) -> None:
        self.in_features = local.in_features
        self.out_features = local.out_features
        self.dtype = local.dtype
        self.local = local
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [M, local K] -> [M, N], equal on all ranks."""
        return self._group.all_reduce(self.local(x))


class VocabParallelEmbedding:
    """Rows of the tokens in `vocab` [begin, end), zeros for others, then the sum: exact, as one term is not zero."""

    def __init__(self, weight: Tensor, vocab: tuple[int, int], group: RankGroup) -> None:
        self._weight = weight
        self._begin, self._end = vocab
        self._group = group

    def __call__(self, token_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, H]."""
        mine = (token_ids >= self._begin) & (token_ids < self._end)
        rows = torch.nn.functional.embedding((token_ids - self._begin).where(mine, 0), self._weight)
        return self._group.all_reduce(rows.masked_fill_(~mine[:, None], 0.0))


class VocabParallelHead:
    """The head with its outputs split over the stage's ranks; logits come together on the first of them."""

    def __init__(self, local: LinearLike, num_columns: tuple[int, ...], group: RankGroup) -> None:
        self.in_features = local.in_features
        self.out_features = local.out_features
        self.dtype = local.dtype
        self.local = local
        self._num_columns = num_columns
        self._group = group

    def __call__(self, x: Tensor) -> Tensor:
        """Multiply x [R, H] -> [R, V] on the stage's first rank, no rows on the others."""
        return self._group.gather(self.local(x), self._num_columns)


def local_linear(linear: LinearLike) -> LinearLike:
    """What this rank computes by itself of a layer: the layer without the exchange around it."""
    return linear.local if isinstance(linear, RowParallelLinear | VocabParallelHead) else linear


def parallelize(config: ModelConfig, weights: ModelWeights, shard: Shard) -> ModelWeights:
    """`weights` of one rank's slices with the exchange between ranks around them.

    Args:
        config: of the whole model.
        weights: as `load_weights` gives them for `shard.partition`.
    """
    partition, group = shard.partition, shard.group
    if partition.tensor_parallel == 1:
        return weights
    layers = tuple(
        replace(layer, o=RowParallelLinear(layer.o, group), down=RowParallelLinear(layer.down, group))
        for layer in weights.layers
    )
    embed, head = weights.embed, weights.lm_head
    if isinstance(embed, Embedding):
        weights = replace(weights, embed=VocabParallelEmbedding(embed.weight, partition.vocab, group))
    if head is not None:
        parts = [_part(config, partition, rank).vocab for rank in partition.tensor_ranks]
        columns = tuple(end - begin for begin, end in parts)
        weights = replace(weights, lm_head=VocabParallelHead(head, columns, group))
    return replace(weights, layers=layers)


def _part(config: ModelConfig, partition: Partition, rank: int) -> Partition:
    return Partition.of(
        config,
        tensor_parallel=partition.tensor_parallel,
        pipeline_parallel=partition.pipeline_parallel,
        rank=rank,
        layers_per_stage=partition.layers_per_stage,
    )
