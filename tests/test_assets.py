"""The models that ship: they are there, small, complete, of one tokenizer, and have learnt something."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

import baton

ASSETS = Path(baton.__file__).parent / "assets"
NAMES = ("tiny", "draft")
VOCAB_SIZE = 4096
MAX_TOTAL_BYTES = 16_000_000
PARAMETERS = {"tiny": (4_000_000, 8_000_000), "draft": (700_000, 1_500_000)}
MAX_LOSS = {"tiny": 3.6, "draft": 4.0}  # nats a token on `UNSEEN`; uniform is 8.3

UNSEEN = '''"""A shelf of books that remembers who borrowed what."""

import os
import sys


class Shelf:
    """Holds books by title.

    Raises ValueError if a title is already there.
    """

    def __init__(self, name=None):
        self.name = name
        self._books = {}

    def add(self, title, author):
        if title in self._books:
            raise ValueError("duplicate title: %r" % title)
        self._books[title] = author

    def get(self, title, default=None):
        """Return the author of a book, or the default."""
        try:
            return self._books[title]
        except KeyError:
            return default

    def __len__(self):
        return len(self._books)


def main():
    shelf = Shelf()
    for line in sys.stdin:
        title, author = line.split(",")
        shelf.add(title.strip(), author.strip())
    print(len(shelf))


if __name__ == "__main__":
    main()
'''


def _config(name: str) -> dict[str, Any]:
    config: dict[str, Any] = json.loads((ASSETS / name / "config.json").read_text())
    return config


def _expected_shapes(name: str) -> dict[str, list[int]]:
    """Tensor name -> shape of a Llama with tied embeddings, from its configuration alone."""
    c = _config(name)
    hidden, inner, head = c["hidden_size"], c["intermediate_size"], c["head_dim"]
    queries, keys = c["num_attention_heads"] * head, c["num_key_value_heads"] * head
    shapes = {"model.embed_tokens.weight": [c["vocab_size"], hidden], "model.norm.weight": [hidden]}
    for i in range(c["num_hidden_layers"]):
        layer = {
            "input_layernorm": [hidden],
            "post_attention_layernorm": [hidden],
            "self_attn.q_proj": [queries, hidden],
            "self_attn.k_proj": [keys, hidden],
            "self_attn.v_proj": [keys, hidden],
            "self_attn.o_proj": [hidden, queries],
            "mlp.gate_proj": [inner, hidden],
            "mlp.up_proj": [inner, hidden],
            "mlp.down_proj": [hidden, inner],
        }
        shapes |= {f"model.layers.{i}.{part}.weight": shape for part, shape in layer.items()}
    return shapes


def test_both_fit_in_the_package() -> None:
    total_bytes = sum(f.stat().st_size for name in NAMES for f in (ASSETS / name).rglob("*") if f.is_file())
    assert total_bytes < MAX_TOTAL_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_exactly_a_llama_in_bf16(name: str) -> None:
    with safe_open(ASSETS / name / "model.safetensors", "pt") as file:
        slices = {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        assert {key: s.get_shape() for key, s in slices.items()} == _expected_shapes(name)
        assert {s.get_dtype() for s in slices.values()} == {"BF16"}
        assert all(file.get_tensor(key).isfinite().all() for key in slices)
    low, high = PARAMETERS[name]
    assert low <= sum(math.prod(shape) for shape in _expected_shapes(name).values()) <= high


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name: str) -> None:
    config = _config(name)
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["vocab_size"] == VOCAB_SIZE
    assert config["max_position_embeddings"] == 2048
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    tokenizer = Tokenizer.from_file(str(ASSETS / name / "tokenizer.json"))
    generation = json.loads((ASSETS / name / "generation_config.json").read_text())
    assert generation["eos_token_id"] == [tokenizer.token_to_id("<|end_of_text|>"), tokenizer.token_to_id("<|im_end|>")]
    assert config["bos_token_id"] == tokenizer.token_to_id("<|begin_of_text|>")


@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"])
def test_draft_has_the_same_tokenizer(file: str) -> None:
    assert (ASSETS / "draft" / file).read_bytes() == (ASSETS / "tiny" / file).read_bytes()


def test_tokenizer_round_trips_any_text() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    assert len(tokenizer) == VOCAB_SIZE
    assert tokenizer.unk_token is None
    for text in (UNSEEN, "", "\x00\x7f", "naïve Ω 漢字 🙂\u200d", "\r\n\t  x  "):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids[1:]) == text
    assert len(tokenizer(UNSEEN)["input_ids"]) < len(UNSEEN) / 2.5  # it compresses Python


def test_chat_template() -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / "tiny")
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Write f"},
        {"role": "assistant", "content": "def f(): pass"},
        {"role": "user", "content": "Again"},
    ]
    rendered = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert rendered == (
        "<|begin_of_text|><|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWrite f<|im_end|>\n"
        "<|im_start|>assistant\ndef f(): pass<|im_end|>\n<|im_start|>user\nAgain<|im_end|>\n<|im_start|>assistant\n"
    )
    ids: list[int] = tokenizer(rendered, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.get_vocab()["<|im_end|>"]) == len(messages)


@pytest.mark.parametrize("name", NAMES)
def test_model_predicts_unseen_python(name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(ASSETS / name)
    model = AutoModelForCausalLM.from_pretrained(ASSETS / name, dtype=torch.float32)
    ids = torch.tensor([tokenizer(UNSEEN)["input_ids"]])
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    assert loss < MAX_LOSS[name] < math.log(VOCAB_SIZE)


@pytest.mark.parametrize("name", NAMES)
def test_card_states_what_was_trained(name: str) -> None:
    card = (ASSETS / name / "README.md").read_text()
    assert "early checkpoint" not in card
    for fact in ("Python Software Foundation License", "train_tiny.py", "validation", "## Samples"):
        assert fact in card
