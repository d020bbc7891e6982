"""Which part of a model a rank holds, as a pure function of the architecture and (TP, PP): no torch.

Ranks of an instance are numbered `stage * tensor_parallel + tensor_rank`. Stages split the layers, tensor ranks split
heads, the MLP's inner size and the vocabulary, all into contiguous ranges:

    layers      stage s holds [s * L // PP, (s + 1) * L // PP), unless `layers_per_stage` says otherwise, which
                `plan_layers` decides for an instance before its ranks start
    q heads     Hq / TP each; KV heads Hk / TP each, or one, shared by TP / Hk ranks, where TP exceeds Hk
    inner       I / TP each
    vocabulary  [t * V // TP, (t + 1) * V // TP): sizes differ by one at most, so V need not divide

`kv_transfer/plan.py` (`layer_range`, `head_range`) splits layers and KV heads by the same rules: pages that travel
between instances land where these ranges say. The two may not import each other; a test holds them together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from baton.engine.kv_layout import KvLayout
from baton.engine.model_config import ModelConfig
from baton.errors import ConfigError

__all__ = ["Partition", "balance_layers", "check_parallel", "plan_layers"]

_EMBEDDING_ROW_COST = 4.0
"""What looking up one row costs, in rows of a matrix that are read: the lookup, the zeros and the sum over ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """One rank's part. Ranges are half-open (begin, end).

    Attributes:
        rank, stage, tensor_rank: `rank == stage * tensor_parallel + tensor_rank`.
        tensor_parallel, pipeline_parallel: sizes.
        layers, q_heads, kv_heads, inner, vocab: what this rank holds of the whole model.
        layers_per_stage: of all stages; empty where they follow the even rule.
    """

    rank: int
    stage: int
    tensor_rank: int
    tensor_parallel: int
    pipeline_parallel: int
    layers: tuple[int, int]
    q_heads: tuple[int, int]
    kv_heads: tuple[int, int]
    inner: tuple[int, int]
    vocab: tuple[int, int]
    layers_per_stage: tuple[int, ...] = ()

    @classmethod
    def of(
        cls,
        config: ModelConfig,
        *,
        tensor_parallel: int = 1,
        pipeline_parallel: int = 1,
        rank: int = 0,
        layers_per_stage: Sequence[int] = (),
    ) -> Partition:
        """The part of `rank`.

        Raises:
            ConfigError: the model cannot be split so; says what would work.
        """
        tp, pp = tensor_parallel, pipeline_parallel
        check_parallel(config, tensor_parallel=tp, pipeline_parallel=pp, layers_per_stage=layers_per_stage)
        assert 0 <= rank < tp * pp, f"rank {rank} of {tp * pp}"
        stage, tensor_rank = divmod(rank, tp)
        if _is_even(config.num_layers, layers_per_stage):
            layers_per_stage = ()
        if layers_per_stage:
            begin = sum(layers_per_stage[:stage])
            layers = (begin, begin + layers_per_stage[stage])
        else:
            layers = _even(config.num_layers, pp, stage)
        return cls(
            rank=rank,
            stage=stage,
            tensor_rank=tensor_rank,
            tensor_parallel=tp,
            pipeline_parallel=pp,
            layers=layers,
            q_heads=_even(config.num_q_heads, tp, tensor_rank),
            kv_heads=_kv_heads(config.num_kv_heads, tp, tensor_rank),
            inner=_even(config.intermediate_size, tp, tensor_rank),
            vocab=_even(config.vocab_size, tp, tensor_rank),
            layers_per_stage=tuple(layers_per_stage),
        )

    @property
    def num_ranks(self) -> int:
        """Ranks of the instance."""
        return self.tensor_parallel * self.pipeline_parallel

    @property
    def is_first_stage(self) -> bool:
        """Whether this rank embeds tokens."""
        return self.stage == 0

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank holds a part of the head."""
        return self.stage == self.pipeline_parallel - 1

    @property
    def driver_rank(self) -> int:
        """The rank that plans and samples: the first of the last stage, where logits come out."""
        return (self.pipeline_parallel - 1) * self.tensor_parallel

    @property
    def is_driver(self) -> bool:
        """Whether this rank is the driver."""
        return self.rank == self.driver_rank

    @property
    def tensor_ranks(self) -> tuple[int, ...]:
        """Ranks of this rank's stage, in order of tensor rank."""
        begin = self.stage * self.tensor_parallel
        return tuple(range(begin, begin + self.tensor_parallel))

    def shard_config(self, config: ModelConfig) -> ModelConfig:
        """`config` as the plain model of this rank sees it: fewer layers, fewer heads."""
        return replace(
            config,
            num_layers=_size(self.layers),
            num_q_heads=_size(self.q_heads),
            num_kv_heads=_size(self.kv_heads),
            intermediate_size=_size(self.inner),
            sliding_windows=config.sliding_windows[slice(*self.layers)],
        )

    def shard_layout(self, layout: KvLayout) -> KvLayout:
        """Layout of this rank's own pool, out of the instance's."""
        return replace(
            layout,
            num_layers=_size(self.layers),
            num_kv_heads=_size(self.kv_heads),
            tensor_parallel=1,
            pipeline_parallel=1,
        )


def check_parallel(
    config: ModelConfig, *, tensor_parallel: int, pipeline_parallel: int, layers_per_stage: Sequence[int] = ()
) -> None:
    """Refuse a (TP, PP) that this model cannot be split into, before any process starts.

    Raises:
        ConfigError: with the sizes that do not divide, and the values of TP or PP that would work.
    """
    if tensor_parallel < 1 or pipeline_parallel < 1:
        raise ConfigError(
            f"tensor_parallel = {tensor_parallel}, pipeline_parallel = {pipeline_parallel}: both must be at least 1"
        )
    problem = _tensor_problem(config, tensor_parallel)
    if problem:
        limit = min(config.num_q_heads, config.vocab_size)
        good = [tp for tp in range(1, limit + 1) if not _tensor_problem(config, tp)]
        raise ConfigError(f"tensor_parallel = {tensor_parallel}: {problem}; what works: {', '.join(map(str, good))}")
    if pipeline_parallel > config.num_layers:
        raise ConfigError(
            f"pipeline_parallel = {pipeline_parallel}, but the model has {config.num_layers} layers and each stage"
            f" needs one; what works: 1 to {config.num_layers}"
        )
    if layers_per_stage and (
        len(layers_per_stage) != pipeline_parallel
        or sum(layers_per_stage) != config.num_layers
        or min(layers_per_stage) < 1
    ):
        raise ConfigError(
            f"layers_per_stage = {list(layers_per_stage)} must be {pipeline_parallel} numbers of at least 1 that sum"
            f" to the model's {config.num_layers} layers"
        )


def plan_layers(
    config: ModelConfig, pipeline_parallel: int, *, given: Sequence[int] = (), sampled_share: float = 1.0
) -> tuple[int, ...]:
    """Layers of each stage of an instance: `given`, or balanced; empty where that is the even rule.

    The one place that decides: whoever starts ranks, and whoever checks before, calls it with the same arguments.

    Args:
        given: by the user; empty means balanced.
        sampled_share: see `balance_layers`.

    Raises:
        ConfigError: the model has fewer layers than stages, or `given` does not fit.
    """
    check_parallel(config, tensor_parallel=1, pipeline_parallel=pipeline_parallel, layers_per_stage=given)
    counts = tuple(given) or balance_layers(config, pipeline_parallel, sampled_share=sampled_share)
    return () if _is_even(config.num_layers, counts) else counts


def balance_layers(config: ModelConfig, pipeline_parallel: int, *, sampled_share: float = 1.0) -> tuple[int, ...]:
    """Layers of each stage such that the slowest stage is as fast as can be, embedding and head counted.

    The cost is what a step reads or multiplies: a layer's weights, the head's on the last stage, a few rows on the
    first. Ties give the later stages, which wait for the earlier ones, the fewer layers.

    Args:
        sampled_share: part of the tokens computed whose logits are wanted, in [0, 1]: 1 where decode rules, about 0
            where prompts are computed, of which the head sees the last token only.
    """
    check_parallel(config, tensor_parallel=1, pipeline_parallel=pipeline_parallel)
    assert 0.0 <= sampled_share <= 1.0, f"sampled_share = {sampled_share}"
    hidden, head_dim = config.hidden_size, config.head_dim
    layer = float(hidden * (2 * config.num_q_heads + 2 * config.num_kv_heads) * head_dim)
    layer += 3.0 * hidden * config.intermediate_size
    first, last = _EMBEDDING_ROW_COST * hidden, sampled_share * hidden * config.vocab_size
    counts = [1] * pipeline_parallel
    for _ in range(config.num_layers - pipeline_parallel):
        costs = [count * layer for count in counts]
        costs[0] += first
        costs[-1] += last
        counts[min(range(pipeline_parallel), key=lambda stage: (costs[stage], stage))] += 1
    return tuple(counts)


def _is_even(num_layers: int, counts: Sequence[int]) -> bool:
    num_stages = len(counts)
    return all(counts[stage] == _size(_even(num_layers, num_stages, stage)) for stage in range(num_stages))


def _tensor_problem(config: ModelConfig, tp: int) -> str:
    """Why the model cannot be split over `tp` tensor ranks, or the empty string."""
    num_q, num_kv, inner = config.num_q_heads, config.num_kv_heads, config.intermediate_size
    if num_q % tp:
        return f"{num_q} query heads do not divide by {tp}"
    if num_kv % tp and tp % num_kv:
        return f"{num_kv} KV heads neither divide by {tp} nor into it"
    if inner % tp:
        return f"the MLP's inner size {inner} does not divide by {tp}"
    if config.vocab_size < tp:
        return f"the vocabulary of {config.vocab_size} is smaller than {tp}"
    return ""


def _even(total: int, num_parts: int, index: int) -> tuple[int, int]:
    return index * total // num_parts, (index + 1) * total // num_parts


def _kv_heads(num_heads: int, tp: int, tensor_rank: int) -> tuple[int, int]:
    begin = tensor_rank * num_heads // tp
    return (begin, begin + 1) if tp > num_heads else (begin, (tensor_rank + 1) * num_heads // tp)


def _size(bounds: tuple[int, int]) -> int:
    return bounds[1] - bounds[0]
