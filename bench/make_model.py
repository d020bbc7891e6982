"""Writes the standard benchmark model: a 246 M Llama with random bf16 weights (seed 0) and a byte-level BPE of 32000.

Usage: python bench/make_model.py DIRECTORY

Vocabulary 32000, hidden 1024, intermediate 2816, 16 layers, 16 heads, 4 KV heads, head_dim 64, untied, rope_theta
500000, 8192 positions: the shape that the figures in docs/benchmarks.md are for.
"""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

_VOWELS = "aeiouAEIOU"
_CONSONANTS = "bcdfghjklmnpqrstvwxyzBCDFGHJKLMNPQRSTVWXYZ"
_SPACE = "Ġ"  # how byte-level BPE writes it


def make_tokenizer(size: int) -> Tokenizer:
    """A BPE of exactly `size` entries, all ASCII: bytes, syllables, words of two with and without a space, one special.

    Servers hold back what is no whole UTF-8 character yet. Of tokens of arbitrary bytes, which a model of random
    weights writes, some would send nothing for many tokens and then all in one chunk, and their times to the first
    token and between tokens would say nothing. The price: it reads ASCII text only.
    """
    byte_symbols = bytes_to_unicode()
    vocabulary = {byte_symbols[byte]: byte for byte in range(128)}
    merges: list[tuple[str, str]] = []

    def merge(left: str, right: str) -> str:
        vocabulary[left + right] = len(vocabulary)
        merges.append((left, right))
        return left + right

    syllables = [merge(consonant, vowel) for consonant in _CONSONANTS for vowel in _VOWELS]
    num_words = (size - 1 - len(vocabulary)) // 2
    pairs = itertools.islice(itertools.product(syllables, syllables), num_words)
    words = [merge(first, second) for first, second in pairs]
    for word in words:
        merge(_SPACE, word)
    for syllable in syllables[: size - 1 - len(vocabulary)]:
        merge(_SPACE, syllable)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end_of_text|>"])
    assert tokenizer.get_vocab_size() == size, tokenizer.get_vocab_size()
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
