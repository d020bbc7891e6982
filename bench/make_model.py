"""Writes the standard benchmark model: a 246 M Llama with random bf16 weights (seed 0) and a byte-level BPE of 32000.

Usage: python bench/make_model.py DIRECTORY

Vocabulary 32000, hidden 1024, intermediate 2816, 16 layers, 16 heads, 4 KV heads, head_dim 64, untied, rope_theta
500000, 8192 positions: the shape that the figures in docs/benchmarks.md are for.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast


def make_tokenizer(size: int) -> Tokenizer:
    """A byte-level BPE of exactly `size` entries: 256 bytes, then pairs of bytes in a fixed order, then one special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {symbol: index for index, symbol in enumerate(alphabet)}
    merges = []
    for left in alphabet:
        for right in alphabet:
            if len(vocabulary) == size - 1:
                break
            vocabulary[left + right] = len(vocabulary)
            merges.append((left, right))
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    return tokenizer


def main() -> None:
    """Writes the model folder named on the command line."""
    folder = Path(sys.argv[1])
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=16,
        num_key_value_heads=4,
        head_dim=64,
        max_position_embeddings=8192,
        rope_theta=500000.0,
        tie_word_embeddings=False,
        eos_token_id=31999,
        bos_token_id=None,
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder)
    fast = PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(32000), eos_token="<|end_of_text|>")
    fast.save_pretrained(folder)
    parameters = sum(p.numel() for p in model.parameters())
    print(f"{folder}: {parameters / 1e6:.0f} M parameters")


if __name__ == "__main__":
    main()
