"""Models of random weights in memory: folders of a shape without the bytes, and engines over them.

The checkpoint is a safetensors file with a true header and a hole where the numbers would be, so that 16 GB of weights
take no time and no disk. While it is loaded, each tensor that would be read is drawn on the device instead.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from baton.engine import weights
from baton.engine.engine import Engine
from baton.engine.graph_buckets import GraphBuckets
from baton.engine.graph_capture import CudaGraphs
from baton.engine.model_config import ModelConfig
from baton.engine.runner import ModelRunner
from baton.engine.step_launcher import StepLauncher

__all__ = ["LLAMA_3_8B", "SMALL", "make_engine", "random_weights", "write_folder"]

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "vocab_size": 128256,
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "attention_bias": False,
    "mlp_bias": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "dtype": "bfloat16",
}
SMALL: dict[str, Any] = {
    **LLAMA_3_8B,
    "vocab_size": 320,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_STD = 0.02


def write_folder(folder: Path, config: Mapping[str, Any]) -> Path:
    """Writes config.json and a checkpoint of holes, in bf16; returns `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(dict(config), indent=1))
    header: dict[str, Any] = {}
    offset = 0
    for name, shape in weights.expected_tensors(ModelConfig.from_dir(folder)).items():
        end = offset + 2 * math.prod(shape)
        header[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    return folder


@contextmanager
def random_weights() -> Iterator[None]:
    """Inside, checkpoints load as random numbers: norms around one, all else normal, on the device."""

    def draw(
        reader: Any, entry: Any, name: str, rows: tuple[int, int], columns: tuple[int, int] | None
    ) -> torch.Tensor:
        shape = [rows[1] - rows[0], *entry.shape[1:]]
        if columns is not None:
            shape[1] = columns[1] - columns[0]
        drawn = torch.empty(shape, dtype=reader._dtype, device=reader._device).normal_(std=_STD)
        return drawn.add_(1.0) if len(shape) == 1 else drawn

    with mock.patch.object(weights._Reader, "_read", draw):
        yield


def make_engine(
    folder: Path,
    *,
    device: str,
    dtype: str = "auto",
    num_blocks: int,
    max_batch_tokens: int,
    max_batch_size: int,
    max_model_len: int,
    block_size: int = 16,
    deterministic: bool = False,
    layers_per_group: int = 4,
) -> Engine:
    """Loads, warms up (captures graphs, where the runner does) and wraps a runner."""
    runner = ModelRunner(
        folder,
        dtype=dtype,
        device=device,
        block_size=block_size,
        num_blocks=num_blocks,
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        max_model_len=max_model_len,
        deterministic=deterministic,
    )
    runner.warm_up()
    launcher = None
    if runner.device.type == "cuda":
        launcher = StepLauncher(
            runner,
            max_batch_tokens=max_batch_tokens,
            max_batch_size=max_batch_size,
            graphs=CudaGraphs(runner.device),
            buckets=GraphBuckets.up_to(max_batch_size),
        )
        launcher.warm_up()
    return Engine(
        runner,
        max_batch_tokens=max_batch_tokens,
        max_batch_size=max_batch_size,
        layers_per_group=layers_per_group,
        launcher=launcher,
    )
