"""Writes a trained model as a Hugging Face folder: weights in bf16, tokenizer, configuration and model card.

Files are written beside the folder first and then renamed into it one by one, so a reader never sees half a file.
"""

from __future__ import annotations

import json
import math
import os
import platform
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tiny_corpus import BOS, CHAT_TEMPLATE, EOT, IM_END, IM_START, PAD
from tokenizers import Tokenizer
from transformers import GenerationConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_CONTINUATIONS = (
    "def read_lines(path):",
    "class Queue:",
    "import os\nimport sys\n\n\nclass",
)  # spaces join the next word
_PURPOSES = {
    "tiny": "It lets a cluster start with no download and gives tests and examples a real distribution of tokens.",
    "draft": "It shares its tokenizer with `tiny` and proposes tokens for it in speculative decoding.",
}
_QUESTIONS = ("Write the function is_empty: Return True if the queue is empty.", "Hello!")


@dataclass(frozen=True, slots=True)
class Facts:
    """What the card states beyond what the weights show. `run` and `corpus` are counters by name."""

    name: str
    commands: list[str]  # the run, then each resumption under another budget
    validation: str  # which text `run["validation_loss"]` was measured on
    is_finished: bool
    run: dict[str, Any]
    corpus: dict[str, int]


def write_folder(folder: Path, model: LlamaForCausalLM, tokenizer: Tokenizer, facts: Facts) -> None:
    """Write every file of the model into `folder`, replacing what is there. `model` becomes bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    model = model.bfloat16()
    end_ids = [tokenizer.token_to_id(EOT), tokenizer.token_to_id(IM_END)]
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=tokenizer.token_to_id(BOS), eos_token_id=end_ids, pad_token_id=tokenizer.token_to_id(PAD)
    )
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        additional_special_tokens=[IM_START, IM_END],
        chat_template=CHAT_TEMPLATE,
        model_max_length=model.config.max_position_embeddings,
        clean_up_tokenization_spaces=False,
    )
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(partial)
        _write_tokenizer(partial, wrapped, tokenizer)
        (partial / "README.md").write_text(_card(model, wrapped, facts))
        for file in sorted(partial.iterdir()):
            file.chmod(0o644)
            os.replace(file, folder / file.name)
    finally:
        shutil.rmtree(partial)


def _write_tokenizer(folder: Path, wrapped: PreTrainedTokenizerFast, tokenizer: Tokenizer) -> None:
    """The files by hand: transformers 4 and 5 name the class and place the template differently; these load in both."""
    tokenizer.save(str(folder / "tokenizer.json"))
    special = {
        "bos_token": BOS,
        "eos_token": EOT,
        "pad_token": PAD,
        "additional_special_tokens": [IM_START, IM_END],
    }
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **special,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": wrapped.model_max_length,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / "special_tokens_map.json").write_text(json.dumps(special, indent=2) + "\n")


@torch.no_grad()
def _generate(model: Any, wrapped: PreTrainedTokenizerFast, ids: list[int], *, sampled: bool) -> str:
    torch.manual_seed(0)
    choice: dict[str, Any] = {"do_sample": True, "temperature": 0.7, "top_p": 0.95} if sampled else {"do_sample": False}
    out = model.generate(torch.tensor([ids]), max_new_tokens=120, **choice)
    return str(wrapped.decode(out[0][len(ids) :], skip_special_tokens=True)).rstrip()


def _samples(model: LlamaForCausalLM, wrapped: PreTrainedTokenizerFast) -> str:
    parts = []
    for text in _CONTINUATIONS:
        ids = wrapped(text)["input_ids"]
        parts.append(f"```python\n{text}{_generate(model, wrapped, ids, sampled=True)}\n```")
    for question in _QUESTIONS:
        messages = [{"role": "user", "content": question}]
        text = str(wrapped.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        ids = wrapped(text, add_special_tokens=False)["input_ids"]
        parts.append(f"> {question}\n\n```text\n{_generate(model, wrapped, ids, sampled=False)}\n```")
    return "\n\n".join(parts)


def _card(model: LlamaForCausalLM, wrapped: PreTrainedTokenizerFast, facts: Facts) -> str:
    """The model card in Markdown, measured numbers only."""
    run, corpus, config = facts.run, facts.corpus, model.config
    num_parameters = sum(p.numel() for p in model.parameters())
    state = "" if facts.is_finished else "\n**An early checkpoint: training has not finished.**\n"
    commands = "\n    ".join(facts.commands)
    resumed = (
        "\nEach command after the first resumed the run under another budget.\n" if len(facts.commands) > 1 else ""
    )
    passes = run["tokens"] / corpus["train_tokens"]
    return f"""---
license: other
license_name: psf-2.0
license_link: https://docs.python.org/3/license.html
language: [en]
library_name: transformers
tags: [llama, code, python]
---

# baton-{facts.name}

A {num_parameters / 1e6:.1f} M parameter Llama that writes something like Python.
{_PURPOSES[facts.name]}
It knows nothing and is no use as an assistant.
{state}
| | |
|---|---|
| Architecture | `LlamaForCausalLM`, {config.num_hidden_layers} layers, tied embeddings |
| Hidden, intermediate | {config.hidden_size}, {config.intermediate_size} |
| Heads, KV heads | {config.num_attention_heads}, {config.num_key_value_heads} |
| Positions | {config.max_position_embeddings} |
| Weights | bf16 safetensors |
| Tokenizer | byte-level BPE, {config.vocab_size} entries, `{BOS}` in front; chat in ChatML form |
| Stops at | `{EOT}` or `{IM_END}` |

## Data and licence

The source of Python {platform.python_version()}'s own standard library without its tests and tables:
{corpus["train_files"]} files for training, {corpus["validation_files"]} held out by a hash of their path.
A tenth of the text is {corpus["chats"]} conversations cut from the same training files: a docstring asks, the function
answers, and a few begin with a line of small talk. {corpus["train_tokens"]:,} training tokens in all.
The sources are under the Python Software Foundation License Version 2; treat the weights the same.

## Training

    {commands}
{resumed}
Seed {corpus["seed"]}, two CPU processes of one thread each, fp32:
{run["step"]:,} steps, {run["tokens"]:,} tokens ({passes:.1f} passes), {run["elapsed_s"] / 60:.0f} minutes.
Sequences of 256, then 512, then 2048 tokens; Muon for the matrices inside the layers, AdamW for the rest; constant
learning rate, then linear decay over the last quarter. A run by `--minutes` follows the clock, so its schedule depends
on the CPU's speed; `--steps {run["step"]}` instead fixes the schedule too.

| loss, nats a token | |
|---|---|
| training, mean of the last steps | {run["train_loss"]:.3f} |
| validation, {facts.validation} | {run["validation_loss"]:.3f} (perplexity {math.exp(run["validation_loss"]):.1f}) |
| uniform over the vocabulary | {math.log(config.vocab_size):.3f} |

## Samples

Continuations at temperature 0.7, top-p 0.95; answers greedy; cut at 120 tokens; the first try, seed 0.

{_samples(model, wrapped)}
"""
