"""What the router must know of the model: names and numbers from its checkpoint directory, no weights."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from baton.engine.tokenizer import Tokenizer
from baton.errors import CheckpointError, ConfigError

__all__ = ["ModelCard", "read_model_card"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCard:
    """The served model.

    Attributes:
        model_id: the name clients use.
        root: where it was loaded from, as configured.
        max_model_len: most tokens of prompt and output together.
        vocab_size: token ids are below this.
        created_s: seconds since the epoch.
    """

    model_id: str
    root: str
    max_model_len: int
    vocab_size: int
    eos_token_ids: tuple[int, ...]
    dtype: str
    created_s: int


def read_model_card(
    folder: Path,
    tokenizer: Tokenizer,
    *,
    model_id: str,
    root: str,
    max_model_len: int | None,
    dtype: str,
    created_s: int,
) -> ModelCard:
    """The card of the checkpoint in `folder`; `max_model_len` None takes the model's own window, "auto" its dtype.

    Raises:
        CheckpointError: `config.json` is missing, damaged or lacks a number.
        ConfigError: `max_model_len` is larger than the model's window.
    """
    config = _read(folder / "config.json", required=True)
    generation = _read(folder / "generation_config.json", required=False)
    window = config.get("max_position_embeddings")
    vocab_size = config.get("vocab_size")
    for name, value in (("max_position_embeddings", window), ("vocab_size", vocab_size)):
        if not isinstance(value, int) or value < 1:
            raise CheckpointError(f"{folder / 'config.json'}: {name} must be a positive integer, found {value!r}")
    assert isinstance(window, int)
    assert isinstance(vocab_size, int)
    if max_model_len is not None and max_model_len > window:
        raise ConfigError(f"model.max_model_len={max_model_len} is larger than the model's window of {window} tokens")
    own_dtype = str(config.get("dtype") or config.get("torch_dtype") or "float32")
    eos = generation.get("eos_token_id", config.get("eos_token_id", tokenizer.eos_token_id))
    eos_ids = tuple(eos) if isinstance(eos, list) else (eos,) if isinstance(eos, int) else ()
    return ModelCard(
        model_id=model_id,
        root=root,
        max_model_len=max_model_len or window,
        vocab_size=vocab_size,
        eos_token_ids=eos_ids,
        dtype=own_dtype if dtype == "auto" else dtype,
        created_s=created_s,
    )


def _read(file: Path, *, required: bool) -> dict[str, Any]:
    if not file.is_file() and not required:
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found a {type(content).__name__}")
    return content
