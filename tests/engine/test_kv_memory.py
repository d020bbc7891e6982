"""KV memory on a GPU: what is left of a rank's fraction, and what is said where nothing is."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from model_factory import VOCAB_SIZE, write_checkpoint

from baton.engine.checkpoint import Checkpoint
from baton.engine.graph_buckets import GraphBuckets
from baton.engine.kv_memory import CONTEXT_BYTES, DeviceMemory, auto_fraction, graph_bytes, plan_kv_bytes
from baton.engine.memory_profile import largest_batch, measured_kv_bytes
from baton.engine.model_config import ModelConfig
from baton.engine.weights import load_weights
from baton.errors import ConfigError

GIB = 1 << 30
H200 = DeviceMemory(total=140 * GIB, free=120 * GIB, weights=16 * GIB, step=2 * GIB)


def test_the_pool_gets_what_the_fraction_leaves() -> None:
    assert plan_kv_bytes(H200, fraction=0.5, graphs=GIB) == 70 * GIB - CONTEXT_BYTES - 19 * GIB


def test_no_more_than_is_free() -> None:
    busy = DeviceMemory(total=140 * GIB, free=10 * GIB, weights=16 * GIB, step=2 * GIB)
    assert plan_kv_bytes(busy, fraction=0.9, graphs=GIB) == 7 * GIB
    with pytest.raises(ConfigError, match=r"2048 MiB of the GPU are free .*needs 3072 MiB; other processes"):
        plan_kv_bytes(DeviceMemory(total=140 * GIB, free=2 * GIB, weights=GIB, step=2 * GIB), fraction=0.9, graphs=GIB)


def test_weights_that_fill_the_budget_are_refused_with_the_numbers() -> None:
    with pytest.raises(ConfigError, match=r"memory_fraction = 0\.1 of 143360 MiB is 14336 MiB.*weights.*16384 MiB"):
        plan_kv_bytes(H200, fraction=0.1, graphs=0)


@given(st.floats(0.05, 0.6), st.floats(0.05, 0.38), st.integers(1, 8 * GIB), st.integers(0, 4 * GIB))
def test_two_ranks_that_share_a_gpu_fit_it_together(first: float, second: float, weights: int, step: int) -> None:
    total = 140 * GIB
    # The worst moment: neither sees what the other will take.
    memory = DeviceMemory(total=total, free=total, weights=weights, step=step)
    taken = 0
    for fraction in (first, second):
        try:
            taken += plan_kv_bytes(memory, fraction=fraction, graphs=0) + weights + step + CONTEXT_BYTES
        except ConfigError:
            continue
    assert taken <= total * (first + second) + 2


def test_automatic_fractions_leave_a_tenth() -> None:
    assert auto_fraction(1, 1) == auto_fraction(4, 4) == auto_fraction(3, 4) == pytest.approx(0.9)
    assert auto_fraction(2, 1) == auto_fraction(8, 4) == pytest.approx(0.45)
    assert auto_fraction(3, 2) == pytest.approx(0.45)


def test_graphs_are_counted_before_they_are_there() -> None:
    assert graph_bytes(GraphBuckets(()), step=GIB, max_batch_tokens=2048, vocab_size=1000) == 0
    some = graph_bytes(GraphBuckets([1, 64]), step=GIB, max_batch_tokens=2048, vocab_size=1000)
    assert some == GIB // 32 + 4 * 64 * 1000 + 2 * (8 << 20)


@pytest.mark.parametrize(("tokens", "length"), [(40, 16), (40, 64), (7, 7)])
def test_the_largest_step_fits_one_block(tokens: int, length: int) -> None:
    batch = largest_batch(
        max_batch_tokens=tokens, max_batch_size=5, max_length=length, block_size=8, device=torch.device("cpu")
    )
    lengths = batch.query_start.diff().tolist()
    assert sum(lengths) == len(batch.token_ids) == tokens
    assert max(lengths) <= length
    assert batch.context_lens.tolist() == lengths
    assert int(batch.slots.max()) < 8
    assert not batch.block_tables.any()
    assert batch.logit_rows.tolist() == list(range(tokens - 5, tokens))
    assert batch.positions[:length].tolist() == list(range(min(length, tokens)))


def test_the_measured_step_is_run_as_it_is_served(tmp_path: Path) -> None:
    write_checkpoint(tmp_path)
    config = ModelConfig.from_dir(tmp_path)
    checkpoint = Checkpoint.from_dir(tmp_path)
    weights = load_weights(config, checkpoint, dtype=torch.float32, device=torch.device("cpu"))
    block = torch.zeros((1, config.num_layers, 2, config.num_kv_heads, 8, config.head_dim))
    runs = []

    class Meter:
        def measure(self, run: object) -> DeviceMemory:
            assert callable(run)
            block.zero_()
            run()
            runs.append(bool(block.abs().sum() > 0))
            return H200

    bytes_ = measured_kv_bytes(
        Meter(),
        config,
        weights,
        block=block,
        max_batch_tokens=64,
        max_batch_size=4,
        fraction=0.9,
        graph_buckets=GraphBuckets([4]),
    )
    assert runs == [True]
    graphs = graph_bytes(GraphBuckets([4]), step=H200.step, max_batch_tokens=64, vocab_size=VOCAB_SIZE)
    assert bytes_ == plan_kv_bytes(H200, fraction=0.9, graphs=graphs)
