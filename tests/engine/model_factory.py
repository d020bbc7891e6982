"""Random tiny checkpoints of each family, written by transformers itself, with a tokenizer that fits.

`CASES` spans what a config can ask for: MHA, GQA, MQA, head sizes that are no power of two, tied and untied embeddings,
biases, windows smaller than the prompts, every kind of rotary scaling.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

__all__ = ["CASES", "END_TOKEN_ID", "VOCAB_SIZE", "write_checkpoint", "write_tokenizer"]

VOCAB_SIZE = 320
END_TOKEN_ID = 256

_BASE: dict[str, Any] = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 48,
    "intermediate_size": 88,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1600,
    "bos_token_id": None,
    "eos_token_id": END_TOKEN_ID,
}

_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}

CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama-mha-tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "llama-gqa-bias": ("Llama", {"attention_bias": True, "mlp_bias": True, "hidden_size": 40, "head_dim": 20}),
    "llama-mqa-llama3": ("Llama", {"num_key_value_heads": 1, "rope_parameters": _LLAMA3}),
    "llama-linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.5, "rope_theta": 1e4}}),
    "llama-dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral-window": ("Mistral", {"sliding_window": 21, "head_dim": 36}),
    "mistral-full": ("Mistral", {"sliding_window": None}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2-window": ("Qwen2", {"use_sliding_window": True, "sliding_window": 17, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 24, "tie_word_embeddings": True}),
    "qwen3-bias-mqa": ("Qwen3", {"head_dim": 10, "num_key_value_heads": 1, "attention_bias": True}),
}
"""Name -> (transformers' class prefix, what differs from the base config)."""


def write_checkpoint(
    path: Path,
    case: str = "llama-gqa-bias",
    *,
    dtype: str = "float32",
    seed: int = 0,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> Path:
    """Write a random model of `case` (with `overrides` of its config) and a tokenizer to `path`; returns `path`.

    Norms and biases are random too, and logits spread over several units, so that no term can be forgotten unnoticed
    and greedy choices do not hang on the last bit.
    """
    family, changes = CASES[case]
    config = getattr(transformers, f"{family}Config")(**{**_BASE, **changes, **overrides})
    model = getattr(transformers, f"{family}ForCausalLM")(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() == 2:
                scale = 1.0 if "embed_tokens" in name else 1.5 * parameter.shape[1] ** -0.5
                parameter.copy_(noise * scale)
            else:
                parameter.copy_(noise * 0.2 + ("norm" in name))
    model.to(getattr(torch, dtype)).save_pretrained(path, max_shard_size=max_shard_size)
    write_tokenizer(path)
    return path


def write_tokenizer(path: Path) -> None:
    """A byte-level tokenizer without merges: ids 0..255 are bytes, `<|end|>` is 256, the rest are unused."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: index for index, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([f"<unused{index}>" for index in range(VOCAB_SIZE - END_TOKEN_ID - 1)])
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = (
        "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    fast.save_pretrained(path)
