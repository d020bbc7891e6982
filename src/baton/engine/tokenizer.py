"""Text to token ids and back, torch-free: `tokenizers` from `tokenizer.json`, the checkpoint's chat template.

    Tokenizer.from_dir(path)     what a checkpoint directory holds
    IncrementalDetokenizer       text of a growing answer, token by token, never half a character

Special tokens written by a *user* in a chat message are text, not control: they are wrapped in one-time markers before
the template sees them, and encoded without the tokenizer's added tokens afterwards.
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable, Mapping, Sequence
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import jinja2
import tokenizers

from baton.engine.chat_template import ChatTemplate
from baton.errors import CheckpointError, InvalidRequestError

__all__ = ["IncrementalDetokenizer", "Tokenizer"]

_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_MAX_PENDING_TOKENS = 24
_REPLACEMENT = "\ufffd"


class Tokenizer:
    """Encodes and decodes for one model. Safe to share between threads.

    Args:
        backend: the fast tokenizer.
        config: content of `tokenizer_config.json`.
        chat_template: Jinja source, or None where the model has none.

    Attributes:
        vocab_size: ids are below this (added tokens included).
        special_tokens: role -> text, for example `eos_token` -> "<|im_end|>".
        special_ids: ids that `skip_special_tokens` leaves out.
    """

    def __init__(
        self, backend: tokenizers.Tokenizer, *, config: Mapping[str, Any], chat_template: str | None = None
    ) -> None:
        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        added = backend.get_added_tokens_decoder()
        self.vocab_size: int = max(backend.get_vocab_size(with_added_tokens=True), max(added, default=-1) + 1)
        self.special_tokens = _special_tokens(config)
        self.special_ids = frozenset(token_id for token_id, token in added.items() if token.special)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._whole_texts: dict[int, str | None] = {}
        try:
            self._template = ChatTemplate(chat_template, self.special_tokens) if chat_template else None
        except jinja2.TemplateSyntaxError as error:
            raise CheckpointError(f"the chat template is not valid: line {error.lineno}: {error.message}") from error

    @classmethod
    def from_dir(cls, path: str | Path) -> Tokenizer:
        """The tokenizer of a Hugging Face checkpoint directory.

        `tokenizer.json` is read directly; where it is missing, transformers converts what is there (sentencepiece,
        vocabulary files). The chat template comes from `chat_template.jinja`, else `chat_template.json`, else
        `tokenizer_config.json`.

        Raises:
            CheckpointError: no tokenizer in `path`, or a damaged file, which is named.
        """
        folder = Path(path)
        config = _read_json(folder / "tokenizer_config.json") or {}
        legacy = _read_json(folder / "special_tokens_map.json") or {}
        file = folder / "tokenizer.json"
        if file.is_file():
            try:
                backend = tokenizers.Tokenizer.from_file(str(file))
            except Exception as error:  # the Rust side raises bare Exception
                raise CheckpointError(f"{file} is not a tokenizer: {error}") from error
        else:
            backend = _convert_with_transformers(folder)
        return cls(backend, config={**legacy, **config}, chat_template=_read_chat_template(folder, config))

    @property
    def has_chat_template(self) -> bool:
        """Whether `apply_chat_template` can work."""
        return self._template is not None

    @property
    def eos_token_id(self) -> int | None:
        """Id of the tokenizer's end token (a model may name more)."""
        return self.token_id(self.special_tokens.get("eos_token", ""))

    @cached_property
    def max_token_chars(self) -> int:
        """Characters of the longest vocabulary entry: a text has at least `len(text) / max_token_chars` tokens."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    def token_id(self, token: str) -> int | None:
        """Id of exactly this vocabulary entry, None where there is none."""
        found: int | None = self._backend.token_to_id(token) if token else None
        return found

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`; with `add_special_tokens` also what `tokenizer.json` puts around it (begin of text)."""
        return _ids(self._backend, text, add_special_tokens=add_special_tokens)

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of `ids`; bytes that are not UTF-8 become U+FFFD."""
        text: str = self._backend.decode(list(ids), skip_special_tokens=skip_special_tokens)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes one token stands for inside a text (empty for an id without a token)."""
        if token_id in self._added:
            return self._added[token_id].encode()
        piece: str | None = self._backend.id_to_token(token_id)
        if piece is None:
            return b""
        if self._is_byte_level:
            table = _byte_level_table()
            if all(char in table for char in piece):
                return bytes(table[char] for char in piece)
        if self._has_byte_fallback and (match := re.fullmatch(r"<0x([0-9A-Fa-f]{2})>", piece)):
            return bytes([int(match[1], 16)])
        return piece.replace("\u2581", " ").encode()

    def token_text(self, token_id: int) -> str:
        """`token_bytes` as text."""
        return self.token_bytes(token_id).decode("utf-8", errors="replace")

    def whole_text(self, token_id: int) -> str | None:
        """The token's text where that is the same in every context; None where it is not, or not known to be."""
        try:
            return self._whole_texts[token_id]
        except KeyError:
            text = self._whole_texts[token_id] = self._find_whole_text(token_id)
            return text

    def _find_whole_text(self, token_id: int) -> str | None:
        """Of decoders that only join bytes: any token that holds whole characters, and is no special one."""
        if _kinds(self._spec.get("decoder")) != {"ByteLevel"} or token_id in self._added:
            return None
        try:
            text = self.token_bytes(token_id).decode()
        except UnicodeDecodeError:
            return None
        return text if text and not text.endswith(_REPLACEMENT) else None

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **options: Any) -> str:
        """The template's text for `messages`; options as for `ChatTemplate.render`."""
        return self._require_template().render(messages, **options)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        kwargs: Mapping[str, Any] | None = None,
    ) -> list[int]:
        """Token ids of a conversation; control tokens inside the messages' own text are encoded as plain text.

        Raises:
            InvalidRequestError: the model has no chat template, or it refuses the messages.
        """
        template = self._require_template()
        marker = _Marker(self._control_tokens)
        text = template.render(
            [marker.mark(message) for message in messages],
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            kwargs=marker.mark(dict(kwargs or {})),
        )
        if not marker.used:
            return self.encode(text, add_special_tokens=False)
        ids: list[int] = []
        for position, (piece, is_user_text) in enumerate(marker.split(text)):
            encoder = self._plain_backend if is_user_text else self._backend
            ids += self._encode_piece(encoder, piece, first=position == 0)
        return ids

    def _require_template(self) -> ChatTemplate:
        if self._template is None:
            raise InvalidRequestError(
                "this model has no chat template; use /v1/completions", param="messages", code="no_chat_template"
            )
        return self._template

    def _encode_piece(self, encoder: tokenizers.Tokenizer, piece: str, *, first: bool) -> list[int]:
        if not first:
            # Behind a newline, so that tokenizers that put a space before the start of a text do not do so here.
            newline = _ids(encoder, "\n")
            ids = _ids(encoder, "\n" + piece)
            if ids[: len(newline)] == newline:
                return ids[len(newline) :]
        return _ids(encoder, piece)

    @cached_property
    def _control_tokens(self) -> tuple[str, ...]:
        assert self._template is not None
        literal = self._template.literal_text
        return tuple(
            content
            for token_id, content in self._added.items()
            if token_id in self.special_ids or (content in literal and not content.isspace())
        )

    @cached_property
    def _spec(self) -> dict[str, Any]:
        spec: dict[str, Any] = json.loads(self._backend.to_str())
        return spec

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """The same model that knows no added tokens: control words are ordinary text to it."""
        return tokenizers.Tokenizer.from_str(json.dumps({**self._spec, "added_tokens": [], "post_processor": None}))

    @cached_property
    def _is_byte_level(self) -> bool:
        return "ByteLevel" in _kinds(self._spec.get("decoder"))

    @cached_property
    def _has_byte_fallback(self) -> bool:
        return "ByteFallback" in _kinds(self._spec.get("decoder"))


def _ids(encoder: tokenizers.Tokenizer, text: str, *, add_special_tokens: bool = False) -> list[int]:
    # The fast one keeps no offsets, and lets other threads run meanwhile.
    ids: list[int] = encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids
    return ids


class IncrementalDetokenizer:
    """Text of a growing answer; O(1) per token.

    Decodes a short window twice (with and without the new tokens) and gives out the difference; characters whose bytes
    are split over tokens wait until they are whole. `prompt_ids` gives the first word its context (leading spaces).
    Tokens whose text is the same in every context need no decoding, as long as nothing waits.

    Args:
        skip_special_tokens: leave special tokens out of the text.
    """

    __slots__ = ("_given", "_nothing_waits", "_prefix", "_skip", "_tokenizer", "_window")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), *, skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = list(prompt_ids[-6:])
        self._given = len(self._window)
        text = self._decode(self._window)
        self._prefix = text.rstrip(_REPLACEMENT)
        self._nothing_waits = self._prefix == text

    def step(self, token_id: int) -> str:
        """The text that became certain with this token, often one word, sometimes empty."""
        if self._nothing_waits:
            whole = self._tokenizer.whole_text(token_id)
            if whole is not None:
                self._window = [token_id]
                self._given = 1
                self._prefix = whole
                return whole
        if self._skip and token_id in self._tokenizer.special_ids:
            return ""
        self._window.append(token_id)
        text = self._decode(self._window)
        whole = text.rstrip(_REPLACEMENT)
        self._nothing_waits = len(whole) == len(text)
        if self._nothing_waits:
            out = text[len(self._prefix) :]
            # What was given out just now is the next token's context; what came before is no longer needed.
            self._window = self._window[self._given :]
            self._given = len(self._window)
            self._prefix = self._decode(self._window)
            return out
        if len(self._window) < _MAX_PENDING_TOKENS:
            return ""
        # A long run that is no UTF-8: give it out, but for the last tokens, which may still begin a character.
        self._window = self._window[-4:]
        self._given = 0
        tail = self._decode(self._window)
        kept = len(tail) - len(tail.rstrip(_REPLACEMENT))
        out = text[len(self._prefix) : len(text) - kept]
        self._prefix = tail[: len(tail) - kept]
        return out

    def flush(self) -> str:
        """What is still held back, at the end of the answer (broken characters as U+FFFD)."""
        text = self._decode(self._window)
        out = text[len(self._prefix) :]
        self._prefix = text
        return out

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=self._skip) if ids else ""


class _Marker:
    """Wraps control tokens in user strings; the one-time number makes the marks impossible to forge."""

    def __init__(self, control_tokens: Iterable[str]) -> None:
        self._tokens = tuple(control_tokens)
        self._start = self._end = ""
        self.used = False

    def mark(self, value: Any) -> Any:
        """`value` with every control token in its strings wrapped; dict keys stay."""
        if isinstance(value, str):
            pattern = _any_of(self._tokens)
            if not pattern.search(value):
                return value
            if not self.used:
                self.used = True
                nonce = secrets.token_hex(8)
                self._start, self._end = f"\U000f0000{nonce}\U000f0001", f"\U000f0002{nonce}\U000f0003"
            return pattern.sub(lambda match: f"{self._start}{match[0]}{self._end}", value)
        if isinstance(value, Mapping):
            return {key: self.mark(item) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [self.mark(item) for item in value]
        return value

    def split(self, text: str) -> list[tuple[str, bool]]:
        """Pieces of the rendered text: (text, whether it was a marked token). Lone marks (the template cut the text
        there) vanish but still part the text, so that what is left and right cannot join into a control token."""
        start, end = re.escape(self._start), re.escape(self._end)
        parts = re.split(f"{start}({_any_of(self._tokens).pattern}){end}|{start}|{end}", text)
        return [(part, index % 2 == 1) for index, part in enumerate(parts) if part]


@lru_cache(maxsize=8)
def _any_of(tokens: tuple[str, ...]) -> re.Pattern[str]:
    longest_first = sorted(tokens, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, longest_first)) or "(?!)")


@lru_cache(maxsize=1)
def _byte_level_table() -> dict[str, int]:
    """Character -> byte of GPT-2's byte-level alphabet: printable bytes stand for themselves, others for U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    table = {chr(byte): byte for byte in printable}
    rest = [byte for byte in range(256) if byte not in set(printable)]
    return table | {chr(0x100 + index): byte for index, byte in enumerate(rest)}


def _kinds(decoder: dict[str, Any] | None) -> set[str]:
    if decoder is None:
        return set()
    inner = [kind for child in decoder.get("decoders", []) for kind in _kinds(child)]
    return {str(decoder.get("type")), *inner}


def _special_tokens(config: Mapping[str, Any]) -> dict[str, str]:
    found = {}
    for name in _SPECIAL_NAMES:
        value = config.get(name)
        text = value.get("content") if isinstance(value, Mapping) else value
        if isinstance(text, str):
            found[name] = text
    return found


def _read_json(file: Path) -> dict[str, Any] | None:
    if not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} must hold a JSON object, found a {type(content).__name__}")
    return content


def _read_chat_template(folder: Path, config: Mapping[str, Any]) -> str | None:
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    found = (_read_json(folder / "chat_template.json") or {}).get("chat_template") or config.get("chat_template")
    if isinstance(found, list):
        named = {entry.get("name"): entry.get("template") for entry in found if isinstance(entry, dict)}
        found = named.get("default")
    return found if isinstance(found, str) else None


def _convert_with_transformers(folder: Path) -> tokenizers.Tokenizer:
    from transformers import AutoTokenizer  # slow to import, and only needed for checkpoints without tokenizer.json

    try:
        converted = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        return converted.backend_tokenizer
    except Exception as error:
        raise CheckpointError(f"{folder} holds no tokenizer.json, and no other tokenizer: {error}") from error
