"""What the check before a start computes and refuses."""

from __future__ import annotations

from pathlib import Path

import pytest

from baton.cluster.model_fit import check_fit, check_layouts, check_memory, memory_of_pool
from baton.config import ClusterConfig, load_config, resolve_model_path
from baton.engine.checkpoint import Checkpoint
from baton.engine.model_config import ModelConfig
from baton.errors import CheckpointError, ConfigError

FOLDER = resolve_model_path("tiny")
MODEL = ModelConfig.from_dir(FOLDER)
CHECKPOINT = Checkpoint.from_dir(FOLDER)
WEIGHTS_BYTES = sum(entry.num_bytes for entry in CHECKPOINT.entries.values())
EMBED_BYTES = CHECKPOINT.entries["model.embed_tokens.weight"].num_bytes


def config_of(**settings: object) -> ClusterConfig:
    return load_config(None, settings)


@pytest.mark.parametrize(("tp", "pp"), [(1, 1), (2, 1), (1, 2), (2, 3)])
def test_ranks_hold_the_model_once_and_tied_embeddings_at_both_ends(tp: int, pp: int) -> None:
    config = config_of(**{"decode.tensor_parallel": tp, "decode.pipeline_parallel": pp})
    ranks = memory_of_pool(config, "decode", MODEL, CHECKPOINT)
    assert MODEL.tie_word_embeddings
    expected = WEIGHTS_BYTES + (EMBED_BYTES if pp > 1 else 0)
    assert sum(rank.weights for rank in ranks) == pytest.approx(expected, abs=len(ranks))


def test_pages_count_for_the_longest_request_on_every_rank() -> None:
    settings = {"model.max_model_len": 100, "decode.block_size": 8, "decode.tensor_parallel": 8}
    ranks = memory_of_pool(config_of(**settings), "decode", MODEL, CHECKPOINT)
    # 8 ranks share 4 KV heads, so every head is held twice.
    assert {rank.kv for rank in ranks} == {13 * 8 * 2 * MODEL.num_layers * MODEL.head_dim * 2}


def test_the_type_that_is_served_counts() -> None:
    (rank,) = memory_of_pool(config_of(**{"model.dtype": "float32"}), "decode", MODEL, CHECKPOINT)
    assert rank.weights == 2 * WEIGHTS_BYTES


def test_too_little_memory_is_told_with_what_would_work() -> None:
    check_memory(config_of(), MODEL, CHECKPOINT, 3 * WEIGHTS_BYTES)
    with pytest.raises(ConfigError, match=r"what works: 2 replicas of each"):
        check_memory(config_of(**{"prefill.replicas": 9}), MODEL, CHECKPOINT, 5 * WEIGHTS_BYTES)
    with pytest.raises(ConfigError, match=r"model\.max_model_len up to about 1[0-9]{3}"):
        check_memory(config_of(**{"model.max_model_len": 2048}), MODEL, CHECKPOINT, 2 * WEIGHTS_BYTES + (8 << 20))
    with pytest.raises(ConfigError, match=r"serve a smaller model"):
        check_memory(config_of(), MODEL, CHECKPOINT, WEIGHTS_BYTES)


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"kv.num_blocks": 10**8}, r"kv\.num_blocks up to about [0-9]{3}"),
        ({"kv.memory": "1TiB"}, r"kv\.memory up to about 4[0-9]\.[0-9] MiB"),
        ({"decode.num_blocks": 10**8}, r"decode\.num_blocks up to about [0-9]{3}"),
    ],
)
def test_pages_that_do_not_fit_are_refused(settings: dict[str, object], told: str) -> None:
    with pytest.raises(ConfigError, match=told):
        check_memory(config_of(**settings), MODEL, CHECKPOINT, 2 * WEIGHTS_BYTES + (90 << 20))


def test_the_pool_that_cannot_be_split_is_named() -> None:
    check_layouts(config_of(**{"prefill.tensor_parallel": 8, "decode.pipeline_parallel": 6}), MODEL)
    with pytest.raises(ConfigError, match=r"^prefill\.tensor_parallel = 16"):
        check_layouts(config_of(**{"prefill.tensor_parallel": 16}), MODEL)


def test_a_damaged_model_points_to_the_doctor(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json.*baton doctor"):
        check_fit(config_of(), "local", tmp_path)
