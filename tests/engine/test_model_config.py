"""config.json to ModelConfig: defaults, both spellings of rotary scaling, and what is refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from baton.engine.model_config import ModelConfig
from baton.engine.rope import rope_tables
from baton.engine.rope_config import RopeConfig
from baton.errors import CheckpointError

_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
_LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def _parse(family: str = "Llama", **keys: Any) -> ModelConfig:
    data = {"architectures": [f"{family}ForCausalLM"], "model_type": family.lower(), **_SIZES, **keys}
    return ModelConfig.from_dict(data)


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Qwen3"])
def test_keys_left_out_take_the_defaults_of_transformers(family: str) -> None:
    sizes = {key: value for key, value in _SIZES.items() if key != "num_key_value_heads"} | {"num_attention_heads": 32}
    reference = getattr(transformers, f"{family}Config")(**sizes)
    data = {"architectures": [f"{family}ForCausalLM"], **sizes}
    config = ModelConfig.from_dict(data)
    assert config.num_kv_heads == reference.num_key_value_heads
    assert config.head_dim == getattr(reference, "head_dim", 64 // 32)
    assert config.max_position_embeddings == reference.max_position_embeddings
    assert config.rms_norm_eps == reference.rms_norm_eps
    assert config.tie_word_embeddings == reference.tie_word_embeddings
    assert config.rope.theta == reference.rope_parameters["rope_theta"]
    window = 4096 if family == "Mistral" else None
    assert config.sliding_windows == (window,) * 3
    assert config.dtype is None


def test_old_and_new_spelling_of_rope_scaling_are_one() -> None:
    new = _parse(rope_parameters={"rope_type": "llama3", "rope_theta": 5e5, **_LLAMA3})
    old = _parse(rope_theta=5e5, rope_scaling={"rope_type": "llama3", **_LLAMA3})
    assert new == old
    assert new.rope.theta == 5e5
    assert new.rope.original_max_position_embeddings == 8192
    linear = RopeConfig(type="linear", theta=1e4, factor=2.0)
    assert _parse(rope_scaling={"type": "linear", "factor": 2.0}).rope == linear
    assert _parse(rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}).rope == linear
    assert _parse(rope_scaling=None, rope_theta=7.0).rope == RopeConfig(theta=7.0)


@pytest.mark.parametrize(
    "parameters",
    [
        {"rope_type": "default"},
        {"rope_type": "linear", "factor": 3.0},
        {"rope_type": "dynamic", "factor": 3.0},
        {"rope_type": "llama3", **_LLAMA3},
    ],
    ids=lambda parameters: parameters["rope_type"],
)
def test_rope_tables_equal_transformers(parameters: dict[str, Any]) -> None:
    parameters = {"rope_theta": 500000.0, **parameters}
    reference = transformers.LlamaConfig(**_SIZES, head_dim=20, rope_parameters=dict(parameters))
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(reference)
    cos, sin = rotary(torch.zeros(1), torch.arange(2048)[None])
    rope = _parse(head_dim=20, rope_parameters=parameters).rope
    own_cos, own_sin = rope_tables(rope, head_dim=20, num_positions=2048, device=torch.device("cpu"))
    assert torch.equal(own_cos, cos[0, :, :10])
    assert torch.equal(own_sin, sin[0, :, :10])


def test_windows_per_layer() -> None:
    assert _parse("Mistral", sliding_window=7).sliding_windows == (7, 7, 7)
    assert _parse("Mistral", sliding_window=None).sliding_windows == (None,) * 3
    assert _parse("Qwen2", sliding_window=7, max_window_layers=1).sliding_windows == (None,) * 3
    windowed = {"use_sliding_window": True, "sliding_window": 7}
    assert _parse("Qwen2", **windowed, max_window_layers=1).sliding_windows == (None, 7, 7)
    types = ["sliding_attention", "full_attention", "sliding_attention"]
    assert _parse("Qwen3", **windowed, layer_types=types).sliding_windows == (7, None, 7)


def test_eos_comes_from_the_generation_config_first(tmp_path: Path) -> None:
    data = {"architectures": ["LlamaForCausalLM"], **_SIZES, "eos_token_id": 2, "torch_dtype": "bfloat16"}
    (tmp_path / "config.json").write_text(json.dumps(data))
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (2,)
    assert ModelConfig.from_dir(tmp_path).dtype == "bfloat16"
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [5, 6]}))
    assert ModelConfig.from_dir(tmp_path).eos_token_ids == (5, 6)


def test_fingerprint_follows_arithmetic_and_weights() -> None:
    plain = _parse()
    assert plain.fingerprint("w") == _parse(eos_token_id=9, dtype="float16").fingerprint("w")
    assert plain.fingerprint("w") != plain.fingerprint("v")
    assert plain.fingerprint("w") != _parse(rms_norm_eps=1e-5).fingerprint("w")


@pytest.mark.parametrize(
    ("family", "keys", "named"),
    [
        ("Llama", {"architectures": ["GPT2LMHeadModel"]}, "architectures.*LlamaForCausalLM"),
        ("Llama", {"architectures": None}, "architectures"),
        ("Llama", {"model_type": "gemma"}, "model_type = 'gemma'"),
        ("Llama", {"vocab_size": None}, "vocab_size is missing"),
        ("Llama", {"hidden_size": -1}, "hidden_size = -1"),
        ("Llama", {"num_hidden_layers": "3"}, "num_hidden_layers = '3'"),
        ("Llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'.*'silu'"),
        ("Llama", {"quantization_config": {"bits": 4}}, "quantization_config"),
        ("Llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor = 0.5"),
        ("Llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "rope_type = 'yarn'.*llama3"),
        ("Llama", {"rope_scaling": {"rope_type": "linear"}}, "rope_scaling.factor is missing"),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": "x"}}, "rope_scaling.factor = 'x'"),
        ("Llama", {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "beta_fast": 3}}, "rope_scaling.beta_fast"),
        ("Llama", {"num_key_value_heads": 3}, "num_key_value_heads = 3.*divisor"),
        ("Llama", {"head_dim": 15}, "head_dim = 15.*even"),
        ("Llama", {"sliding_window": 32}, "sliding_window = 32.*LlamaForCausalLM"),
        ("Llama", {"tie_word_embeddings": "yes"}, "tie_word_embeddings"),
        ("Llama", {"rms_norm_eps": 0}, "rms_norm_eps = 0"),
        ("Llama", {"dtype": "int8"}, "dtype = 'int8'.*bfloat16"),
        ("Llama", {"eos_token_id": "x"}, "eos_token_id"),
        ("Mistral", {"attention_bias": True}, "attention_bias = True"),
        ("Qwen2", {"mlp_bias": True}, "mlp_bias = True"),
        ("Qwen2", {"layer_types": ["full_attention"]}, "layer_types.*3 entries"),
        ("Qwen3", {"layer_types": ["sliding_attention"] * 3}, "layer_types.*no sliding_window"),
        ("Qwen3", {"num_experts": 8}, "num_experts = 8"),
    ],
)
def test_unsupported_keys_are_refused_by_name(family: str, keys: dict[str, Any], named: str) -> None:
    with pytest.raises(CheckpointError, match=named):
        _parse(family, **keys)


def test_missing_or_broken_config_names_the_file(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere does not exist"):
        ModelConfig.from_dir(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"config\.json is missing"):
        ModelConfig.from_dir(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"config\.json cannot be read as JSON"):
        ModelConfig.from_dir(tmp_path)
