"""What a Hugging Face `config.json` says, reduced to what Baton computes with: a plain value, no torch.

Four architectures are one model with switches: Llama, Mistral (sliding window), Qwen2 (bias on q, k, v) and Qwen3
(norms on q and k). A key that would change the arithmetic and is not supported is refused by name; it is never
ignored. Keys left out take the defaults of transformers' config classes.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.engine.kv_layout import DTYPE_BYTES, KvLayout
from baton.engine.rope_config import RopeConfig, parse_rope, positive, unsupported
from baton.errors import CheckpointError

__all__ = ["ModelConfig"]

_MAX_DIMENSION = 1 << 24


@dataclass(frozen=True, slots=True)
class _Family:
    """What an architecture fixes, and transformers' defaults for keys a config may leave out."""

    model_type: str
    max_position_embeddings: int
    num_key_value_heads: int | None
    head_dim: int | None = None
    qkv_bias: bool = False
    has_attention_bias_key: bool = False
    has_mlp_bias_key: bool = False
    qk_norm: bool = False
    windows: str = "none"


_FAMILIES = {
    "LlamaForCausalLM": _Family("llama", 2048, None, has_attention_bias_key=True, has_mlp_bias_key=True),
    "MistralForCausalLM": _Family("mistral", 4096 * 32, 8, windows="all"),
    "Qwen2ForCausalLM": _Family("qwen2", 32768, 32, qkv_bias=True, windows="per_layer"),
    "Qwen3ForCausalLM": _Family(
        "qwen3", 32768, 32, head_dim=128, has_attention_bias_key=True, qk_norm=True, windows="per_layer"
    ),
}

# Keys of other architectures that change the arithmetic. Their presence under one of ours means a modified model.
_REFUSED_KEYS = (
    "quantization_config",
    "compression_config",
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "attn_logit_softcapping",
    "final_logit_softcapping",
    "query_pre_attn_scalar",
    "logit_scale",
    "logits_scaling",
    "embedding_multiplier",
    "residual_multiplier",
    "attention_multiplier",
    "attention_chunk_size",
    "no_rope_layers",
    "layer_norm_eps",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """One model's architecture.

    Attributes:
        architecture: transformers' class name.
        num_q_heads, num_kv_heads: a multiple of each other (MHA, GQA, MQA).
        qkv_bias, o_bias, mlp_bias: which linear layers add a bias.
        qk_norm: RMS norm over each head of q and k before rotation.
        sliding_windows: per layer, the number of visible keys including the query's own; None sees everything.
        dtype: "float32", "bfloat16" or "float16" as stored; None when the config does not say.
        max_position_embeddings: tokens; no sequence may be longer. With rope type "dynamic" frequencies beyond it
            would depend on the sequence's length and not on the position alone, so this is a hard limit there.
        eos_token_ids: any of them ends an output; from generation_config.json, then config.json.
    """

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    rms_norm_eps: float
    rope: RopeConfig
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    sliding_windows: tuple[int | None, ...]
    dtype: str | None
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    @classmethod
    def from_dir(cls, path: str | Path) -> ModelConfig:
        """Read `config.json` (and `generation_config.json` where there is one) of a model folder.

        Raises:
            CheckpointError: a file is missing or broken, or a key asks for what Baton does not compute.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise CheckpointError(f"model folder {folder} does not exist")
        data = _read_json(folder / "config.json")
        generation_file = folder / "generation_config.json"
        generation = _read_json(generation_file) if generation_file.exists() else {}
        return cls.from_dict(data, generation=generation, source=str(folder / "config.json"))

    @classmethod
    def from_dict(
        cls, data: Mapping[str, Any], *, generation: Mapping[str, Any] | None = None, source: str = "config.json"
    ) -> ModelConfig:
        """Parse a `config.json`'s content; `source` is the name that errors give."""
        return _Parser(data, generation or {}, source).parse()

    @property
    def attention_scale(self) -> float:
        """Factor on q @ k before the softmax."""
        return float(self.head_dim**-0.5)

    def kv_layout(self, *, block_size: int, dtype: str) -> KvLayout:
        """Layout of this model's KV pages on one rank."""
        return KvLayout(
            num_layers=self.num_layers,
            num_kv_heads=self.num_kv_heads,
            head_dim=self.head_dim,
            block_size=block_size,
            dtype=dtype,
        )

    def fingerprint(self, weights_digest: str = "") -> str:
        """Digest of the arithmetic and of the weights' identity: peers that differ must not exchange pages."""
        fields = dataclasses.asdict(self)
        for name in ("dtype", "bos_token_id", "eos_token_ids"):
            del fields[name]
        text = json.dumps([fields, weights_digest], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:32]


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; a model folder needs it") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{path} must hold a JSON object, not {type(data).__name__}")
    return data


class _Parser:
    """One pass over a config's keys; each method owns some of them and names the key in its errors."""

    def __init__(self, data: Mapping[str, Any], generation: Mapping[str, Any], source: str) -> None:
        self._data = data
        self._generation = generation
        self._source = source

    def parse(self) -> ModelConfig:
        architecture, family = self._family()
        self._refuse_unsupported(architecture, family)
        hidden_size = self._size("hidden_size")
        num_layers = self._size("num_hidden_layers")
        num_q_heads = self._size("num_attention_heads")
        num_kv_heads = self._size("num_key_value_heads", family.num_key_value_heads or num_q_heads)
        if num_q_heads % num_kv_heads:
            raise self._error("num_key_value_heads", num_kv_heads, f"a divisor of num_attention_heads = {num_q_heads}")
        head_dim = self._size("head_dim", family.head_dim or hidden_size // num_q_heads)
        if head_dim % 2:
            raise self._error("head_dim", head_dim, "an even number (rotary embedding pairs dimensions)")
        attention_bias = family.has_attention_bias_key and self._flag("attention_bias", False)
        return ModelConfig(
            architecture=architecture,
            vocab_size=self._size("vocab_size"),
            hidden_size=hidden_size,
            intermediate_size=self._size("intermediate_size"),
            num_layers=num_layers,
            num_q_heads=num_q_heads,
            num_kv_heads=num_kv_heads,
            head_dim=head_dim,
            rms_norm_eps=positive(self._source, "rms_norm_eps", self._data.get("rms_norm_eps", 1e-6)),
            rope=parse_rope(self._data, self._source),
            max_position_embeddings=self._size("max_position_embeddings", family.max_position_embeddings),
            tie_word_embeddings=self._flag("tie_word_embeddings", False),
            qkv_bias=family.qkv_bias or attention_bias,
            o_bias=attention_bias,
            mlp_bias=family.has_mlp_bias_key and self._flag("mlp_bias", False),
            qk_norm=family.qk_norm,
            sliding_windows=self._windows(family, num_layers),
            dtype=self._dtype(),
            bos_token_id=self._bos_token_id(),
            eos_token_ids=self._eos_token_ids(),
        )

    def _error(self, key: str, value: object, supported: str) -> CheckpointError:
        return unsupported(self._source, key, value, supported)

    def _family(self) -> tuple[str, _Family]:
        names = self._data.get("architectures")
        if not isinstance(names, list) or len(names) != 1 or names[0] not in _FAMILIES:
            raise self._error("architectures", names, ", ".join(sorted(_FAMILIES)))
        family = _FAMILIES[names[0]]
        model_type = self._data.get("model_type", family.model_type)
        if model_type != family.model_type:
            raise self._error("model_type", model_type, f"{family.model_type!r} for {names[0]}")
        return names[0], family

    def _refuse_unsupported(self, architecture: str, family: _Family) -> None:
        for key in _REFUSED_KEYS:
            if self._data.get(key) is not None:
                raise self._error(key, self._data[key], f"a plain {architecture} without {key}")
        hidden_act = self._data.get("hidden_act", "silu")
        if hidden_act != "silu":
            raise self._error("hidden_act", hidden_act, "'silu'")
        for key, has_key in (
            ("attention_bias", family.has_attention_bias_key or family.qkv_bias),
            ("mlp_bias", family.has_mlp_bias_key),
        ):
            if self._data.get(key) and not has_key:
                raise self._error(key, self._data[key], f"false for {architecture}")
        if family.qkv_bias and self._data.get("attention_bias") is False:
            raise self._error("attention_bias", False, f"true for {architecture}, which always has it on q, k and v")
        if family.windows == "none" and self._data.get("sliding_window") is not None:
            raise self._error("sliding_window", self._data["sliding_window"], f"null for {architecture}")

    def _size(self, key: str, default: int | None = None) -> int:
        value = self._data.get(key)
        if value is None:
            value = default
        if value is None:
            raise CheckpointError(f"{self._source}: {key} is missing")
        if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_DIMENSION:
            raise self._error(key, value, f"an integer in 1..{_MAX_DIMENSION}")
        return value

    def _flag(self, key: str, default: bool) -> bool:
        value = self._data.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self._error(key, value, "true or false")
        return value

    def _windows(self, family: _Family, num_layers: int) -> tuple[int | None, ...]:
        layer_types = self._data.get("layer_types")
        if family.windows == "none":
            window, first = None, num_layers
        elif family.windows == "all":
            has_window = self._data.get("sliding_window", 4096) is not None
            window = self._size("sliding_window", 4096) if has_window else None
            first = 0
        else:
            use_window = self._flag("use_sliding_window", False) and self._data.get("sliding_window", 4096) is not None
            window = self._size("sliding_window", 4096) if use_window else None
            first = num_layers if layer_types is not None else self._data.get("max_window_layers", 28)
            if not isinstance(first, int) or isinstance(first, bool) or first < 0:
                raise self._error("max_window_layers", first, "an integer >= 0")
        implied = tuple(window if layer >= first else None for layer in range(num_layers))
        if layer_types is None:
            return implied
        known = {"full_attention": None, "sliding_attention": window}
        if not isinstance(layer_types, list) or len(layer_types) != num_layers or not set(layer_types) <= set(known):
            raise self._error("layer_types", layer_types, f"{num_layers} entries, each of {sorted(known)}")
        if "sliding_attention" in layer_types and window is None:
            raise self._error("layer_types", layer_types, "full_attention only, as no sliding_window is in use")
        windows = tuple(known[name] for name in layer_types)
        if family.windows != "per_layer" and windows != implied:
            raise self._error("layer_types", layer_types, "the same type for every layer of this architecture")
        return windows

    def _dtype(self) -> str | None:
        key = "dtype" if self._data.get("dtype") is not None else "torch_dtype"
        value = self._data.get(key)
        if value is None:
            return None
        name = value.removeprefix("torch.") if isinstance(value, str) else value
        if name not in DTYPE_BYTES:
            raise self._error(key, value, ", ".join(DTYPE_BYTES))
        return str(name)

    def _bos_token_id(self) -> int | None:
        value = self._data.get("bos_token_id")
        if isinstance(value, list):
            value = value[0] if value else None
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self._error("bos_token_id", value, "an integer")
        return value

    def _eos_token_ids(self) -> tuple[int, ...]:
        value = self._generation.get("eos_token_id")
        if value is None:
            value = self._data.get("eos_token_id")
        if value is None:
            return ()
        ids = value if isinstance(value, list) else [value]
        if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
            raise self._error("eos_token_id", value, "an integer or a list of integers")
        return tuple(ids)
