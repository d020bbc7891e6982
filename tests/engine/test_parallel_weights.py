"""Sharded loading: each rank reads its slices and no more, and together they are the checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from model_factory import write_checkpoint

from baton.engine.checkpoint import Checkpoint
from baton.engine.linear import Embedding
from baton.engine.model_config import ModelConfig
from baton.engine.partition import Partition
from baton.engine.weights import ModelWeights, load_weights
from baton.errors import CheckpointError


def _load(path: Path, tp: int, pp: int, rank: int) -> tuple[ModelWeights, int]:
    """The weights of a rank, and how many bytes it read."""
    config = ModelConfig.from_dir(path)
    read = [0]
    weights = load_weights(
        config,
        Checkpoint.from_dir(path),
        dtype=torch.float32,
        device=torch.device("cpu"),
        progress=lambda done, _total, _name: read.__setitem__(0, done),
        partition=Partition.of(config, tensor_parallel=tp, pipeline_parallel=pp, rank=rank),
    )
    return weights, read[0]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_products_of_the_shards_add_up_to_the_whole(tp: int, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-gqa-bias", vocab_size=321)
    whole, _ = _load(path, 1, 1, 0)
    shards = [_load(path, tp, 1, rank)[0] for rank in range(tp)]
    layer, parts = whole.layers[1], [shard.layers[1] for shard in shards]
    generator = torch.Generator().manual_seed(0)

    def random(features: int) -> torch.Tensor:
        return torch.randn((5, features), generator=generator)

    x = random(40)
    assert whole.lm_head is not None
    logits = torch.cat([shard.lm_head(x) for shard in shards if shard.lm_head is not None], dim=1)
    torch.testing.assert_close(logits, whole.lm_head(x))
    # Query heads are split; a KV head may be held twice and must be the same then.
    heads = [part.qkv(x).view(5, -1, 20) for part in parts]
    num_q = 4 // tp
    wanted = layer.qkv(x).view(5, -1, 20)
    torch.testing.assert_close(torch.cat([h[:, :num_q] for h in heads], dim=1), wanted[:, :4])
    for rank, held in enumerate(heads):
        first = rank * 2 // tp
        kv = slice(4 + first, 4 + first + max(1, 2 // tp))
        torch.testing.assert_close(held[:, num_q : (held.shape[1] + num_q) // 2], wanted[:, kv])
    attention, inner = random(80), random(88)
    for name, rows in (("o", attention), ("down", inner)):
        pieces = rows.chunk(tp, dim=1)
        total = sum(getattr(part, name)(piece) for part, piece in zip(parts, pieces, strict=True))
        torch.testing.assert_close(total, getattr(layer, name)(rows))
    assert isinstance(whole.embed, Embedding)
    tables = [shard.embed.weight for shard in shards if isinstance(shard.embed, Embedding)]
    assert torch.equal(torch.cat(tables), whole.embed.weight)


@pytest.mark.parametrize("case", ["llama-mha-tied", "llama-linear"])
def test_a_rank_reads_its_slices_only(case: str, tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, case)
    total = sum(entry.num_bytes for entry in Checkpoint.from_dir(path).entries.values())
    assert _load(path, 1, 1, 0)[1] == total
    tied = case == "llama-mha-tied"
    for tp, pp in ((2, 1), (1, 3), (2, 3)):
        ranks = [_load(path, tp, pp, rank)[1] for rank in range(tp * pp)]
        # The norms are on every tensor rank; a tied table is on the first and on the last stage.
        norms = (2 * 3 + 1) * 48 * 4
        table = 320 * 48 * 4
        assert sum(ranks) == total + (tp - 1) * norms + (table if tied and pp > 1 else 0)
    weights, _ = _load(path, 1, 3, 1)
    assert weights.embed is None
    assert weights.lm_head is None
    assert len(weights.layers) == 1


def test_what_is_damaged_is_refused_on_every_rank(tmp_path: Path) -> None:
    path = write_checkpoint(tmp_path, "llama-linear")
    config = (path / "config.json").read_text()
    (path / "config.json").write_text(config.replace('"intermediate_size": 88', '"intermediate_size": 96'))
    for rank in range(2):
        with pytest.raises(CheckpointError, match=r"gate_proj\.weight has shape \[88, 48\]"):
            _load(path, 2, 1, rank)
