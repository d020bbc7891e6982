"""Which rank holds what: everything once (KV heads in replicas), the same as the transfer plan says, or refused."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from baton.engine.model_config import ModelConfig
from baton.engine.partition import Partition, balance_layers, check_parallel, plan_layers
from baton.errors import ConfigError
from baton.kv_transfer.plan import head_range, layer_range


def config(**fields: object) -> ModelConfig:
    data = {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 321,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 7,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        **fields,
    }
    return ModelConfig.from_dict(data)


def parts(model: ModelConfig, tp: int, pp: int) -> list[Partition]:
    return [Partition.of(model, tensor_parallel=tp, pipeline_parallel=pp, rank=rank) for rank in range(tp * pp)]


@given(
    st.integers(1, 40),
    st.integers(1, 8),
    st.integers(1, 4),
    st.integers(1, 8),
    st.integers(8, 5000),
    st.integers(1, 8),
    st.integers(1, 8),
)
def test_every_layout_holds_the_whole_model_as_the_transfer_plan_sees_it(
    layers: int, kv_heads: int, group: int, inner: int, vocab: int, tp: int, pp: int
) -> None:
    model = config(
        num_hidden_layers=layers,
        num_attention_heads=kv_heads * group,
        num_key_value_heads=kv_heads,
        intermediate_size=inner * 24,
        vocab_size=vocab,
        head_dim=8,
    )
    try:
        all_parts = parts(model, tp, pp)
    except ConfigError:
        heads = kv_heads * group
        assert heads % tp or (kv_heads % tp and tp % kv_heads) or (inner * 24) % tp or pp > layers
        return
    layout = replace(model.kv_layout(block_size=16, dtype="float32"), tensor_parallel=tp, pipeline_parallel=pp)
    for part in all_parts:
        assert part.layers == layer_range(layout, part.stage)
        assert part.kv_heads == head_range(layout, part.tensor_rank)
        # Each query head finds its own KV head on its rank.
        for q in range(*part.q_heads):
            assert part.kv_heads[0] <= q // group < part.kv_heads[1]
        num_q, num_kv = (end - begin for begin, end in (part.q_heads, part.kv_heads))
        assert num_q % num_kv == 0
        own = part.shard_layout(layout)
        assert (own.num_layers, own.num_kv_heads) == (part.layers[1] - part.layers[0], num_kv)
    for name, total in (("q_heads", kv_heads * group), ("inner", inner * 24), ("vocab", vocab)):
        held = [i for part in all_parts[:tp] for i in range(*getattr(part, name))]
        assert held == list(range(total))
    assert [i for part in all_parts[::tp] for i in range(*part.layers)] == list(range(layers))
    assert [part.rank for part in all_parts if part.is_driver] == [(pp - 1) * tp]


@pytest.mark.parametrize(
    ("tp", "pp", "text"),
    [
        (3, 1, "tensor_parallel = 3: 8 query heads do not divide by 3; what works: 1, 2, 4, 8"),
        (16, 1, "tensor_parallel = 16: 8 query heads do not divide by 16; what works: 1, 2, 4, 8"),
        (1, 8, "pipeline_parallel = 8, but the model has 7 layers and each stage needs one; what works: 1 to 7"),
        (0, 1, "both must be at least 1"),
    ],
)
def test_what_does_not_divide_is_refused_with_what_would_work(tp: int, pp: int, text: str) -> None:
    with pytest.raises(ConfigError) as info:
        check_parallel(config(), tensor_parallel=tp, pipeline_parallel=pp)
    assert text in str(info.value)


def test_each_size_is_named() -> None:
    with pytest.raises(ConfigError, match="6 KV heads neither divide by 4 nor into it; what works: 1, 2, 3, 6, 12"):
        check_parallel(
            config(num_attention_heads=12, num_key_value_heads=6, head_dim=8), tensor_parallel=4, pipeline_parallel=1
        )
    with pytest.raises(ConfigError, match="inner size 94 does not divide by 4; what works: 1, 2"):
        check_parallel(config(intermediate_size=94), tensor_parallel=4, pipeline_parallel=1)
    with pytest.raises(ConfigError, match=r"layers_per_stage = \[4, 4\] must be 2 numbers .* sum to the model's 7"):
        check_parallel(config(), tensor_parallel=1, pipeline_parallel=2, layers_per_stage=(4, 4))


def test_given_layers_per_stage_win() -> None:
    layers = [
        Partition.of(config(), pipeline_parallel=3, rank=rank, layers_per_stage=(4, 2, 1)).layers for rank in range(3)
    ]
    assert layers == [(0, 4), (4, 6), (6, 7)]


@given(st.integers(1, 30), st.integers(1, 6), st.sampled_from([32, 4_000, 300_000]))
def test_balance_counts_the_head(layers: int, pp: int, vocab: int) -> None:
    if pp > layers:
        return
    model = config(num_hidden_layers=layers, vocab_size=vocab)
    counts = balance_layers(model, pp)
    check_parallel(model, tensor_parallel=1, pipeline_parallel=pp, layers_per_stage=counts)
    assert counts[-1] == min(counts)
    assert max(counts[:-1], default=0) - min(counts[:-1], default=0) <= 1
    if vocab == 300_000 and 1 < pp < layers:
        # This head costs more than all layers together.
        assert counts[-1] == 1


def test_the_head_counts_as_far_as_it_is_used() -> None:
    model = config(num_hidden_layers=16, vocab_size=2000)
    assert balance_layers(model, 2, sampled_share=0.0) == (8, 8)
    assert balance_layers(model, 2, sampled_share=1.0)[1] < 8


@given(st.integers(1, 30), st.integers(1, 6), st.sampled_from([32, 4_000, 300_000]), st.sampled_from([0.0, 0.2, 1.0]))
def test_planned_layers_are_empty_where_the_even_rule_gives_them(
    layers: int, pp: int, vocab: int, sampled_share: float
) -> None:
    if pp > layers:
        return
    model = config(num_hidden_layers=layers, vocab_size=vocab)
    counts = plan_layers(model, pp, sampled_share=sampled_share)
    even = tuple(end - begin for begin, end in (part.layers for part in parts(model, 1, pp)))
    assert counts != even
    assert (counts or even) == balance_layers(model, pp, sampled_share=sampled_share)
    assert plan_layers(model, pp, given=even) == ()
    assert Partition.of(model, pipeline_parallel=pp, layers_per_stage=even) == Partition.of(model, pipeline_parallel=pp)
    layout = replace(model.kv_layout(block_size=16, dtype="float32"), pipeline_parallel=pp, layers_per_stage=counts)
    for rank in range(pp):
        part = Partition.of(model, pipeline_parallel=pp, rank=rank, layers_per_stage=counts)
        assert part.layers == layer_range(layout, rank)


def test_given_layers_that_do_not_fit_are_refused() -> None:
    assert plan_layers(config(), 2, given=(4, 3)) == (4, 3)
    with pytest.raises(ConfigError, match=r"layers_per_stage = \[4, 4\] must be 2 numbers"):
        plan_layers(config(), 2, given=(4, 4))
    with pytest.raises(ConfigError, match="the model has 7 layers and each stage needs one"):
        plan_layers(config(), 8)
