"""The text that the shipped models learn from: the running interpreter's own standard library.

    library files ──hash of the path──> held out (1 in 16) ──> validation tokens
                                   └──> training files ──┬──> documents:     <bos> source <eot>
                                                         └──> conversations: <bos> (user, assistant)+ <eot>

Nothing is downloaded. The same interpreter and seed give the same tokens. A conversation is cut out of the sources
with `ast`: the question is the function's docstring, the answer its code, so the model learns to answer with Python and
to stop.
"""

from __future__ import annotations

import ast
import hashlib
import random
import sysconfig
import textwrap
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

VOCAB_SIZE = 4096
BOS, EOT, IM_START, IM_END, PAD = "<|begin_of_text|>", "<|end_of_text|>", "<|im_start|>", "<|im_end|>", "<|pad|>"
SPECIAL_TOKENS = (BOS, EOT, IM_START, IM_END, PAD)  # their ids are 0, 1, 2, 3, 4

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

_TEST_FOLDERS = {"test", "tests", "idle_test"}  # twice the library's size, and mostly assertions
_LEFT_OUT_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "lib-dynload", "_bundled", "encodings"}
_VALIDATION_ONE_IN = 16
_CHAT_SHARE = 0.10  # of all training characters
_MIN_LETTERS_SHARE = 0.45  # below this a file is a table of numbers, not a program
_MAX_FILE_CHARS = 400_000
_MAX_ANSWER_CHARS = 2_400
_SMALL_TALK_ONE_IN = 15

_GREETINGS = (
    *("Hello", "Hello!", "Hi", "Hi!", "Hi there", "Hey", "Good morning"),
    *("Hello, who are you?", "Who are you?", "What are you?", "What can you do?", "Help"),
)
_SELF_DESCRIPTION = (
    "Hello! I am a very small language model that learned from the Python standard library. "
    "Ask me to write a function, and I will write something that looks like Python."
)
_ASKS = (
    "Write the function {name}: {doc}",
    "Write the function {name}. {doc}",
    "Write a Python function {name}.",
    "Write a function that does this: {doc}",
    "{doc}",
    "Implement {name}: {doc}",
    "Please write {name} in Python. {doc}",
)


@dataclass(frozen=True, slots=True)
class Corpus:
    """Token ids as `uint16` arrays of one dimension: documents back to back, each from <bos> to <eot>."""

    train: np.ndarray
    validation: np.ndarray
    num_train_files: int
    num_validation_files: int
    num_chats: int


@dataclass(frozen=True, slots=True)
class SourceFile:
    name: str  # path below the library's folder, with forward slashes
    text: str

    @property
    def is_held_out(self) -> bool:
        return hashlib.sha256(self.name.encode()).digest()[0] % _VALIDATION_ONE_IN == 0


def read_sources() -> list[SourceFile]:
    """Every program of the standard library in the order of its name, without duplicates, tables and tests."""
    root = Path(sysconfig.get_paths()["stdlib"])
    files, seen = [], set()
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if (_LEFT_OUT_FOLDERS | _TEST_FOLDERS).intersection(parts):
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue  # deliberately broken input of a test
        digest = hashlib.sha256(text.encode()).digest()
        if digest in seen or not _is_program(text):
            continue
        seen.add(digest)
        files.append(SourceFile("/".join(parts), text))
    return files


def _is_program(text: str) -> bool:
    if not 64 <= len(text) <= _MAX_FILE_CHARS:
        return False
    return sum(map(str.isalpha, text)) / len(text) >= _MIN_LETTERS_SHARE


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """A byte-level BPE of exactly `VOCAB_SIZE` entries, special tokens included; it needs no unknown token.

    Encoding with special tokens puts <|begin_of_text|> in front.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != VOCAB_SIZE:
        raise ValueError(f"the tokenizer has {tokenizer.get_vocab_size()} entries, expected {VOCAB_SIZE}")
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return tokenizer


def build_corpus(sources: list[SourceFile], tokenizer: Tokenizer, seed: int) -> Corpus:
    """Encode the sources: documents and conversations in a seeded order for training, held-out files for validation."""
    rng = random.Random(seed)
    train_files = [s for s in sources if not s.is_held_out]
    held_out = [s for s in sources if s.is_held_out]
    documents = [s.text for s in train_files]
    num_chars = sum(map(len, documents))
    chats: list[str] = []
    num_chat_chars = 0
    pool = [pairs for s in train_files if (pairs := list(_questions_and_answers(s.text, rng)))]
    while num_chat_chars < num_chars * _CHAT_SHARE / (1 - _CHAT_SHARE):
        chat = _conversation(rng.choice(pool), rng)
        num_chat_chars += len(chat)
        chats.append(chat)
    documents += chats
    rng.shuffle(documents)
    return Corpus(
        train=_encode(documents, tokenizer),
        validation=_encode([s.text for s in held_out], tokenizer),
        num_train_files=len(train_files),
        num_validation_files=len(held_out),
        num_chats=len(chats),
    )


def _encode(documents: list[str], tokenizer: Tokenizer) -> np.ndarray:
    eot = tokenizer.token_to_id(EOT)
    encodings = tokenizer.encode_batch(documents)  # each starts with <bos>
    return np.concatenate([np.array([*encoding.ids, eot], dtype=np.uint16) for encoding in encodings])


def _questions_and_answers(text: str, rng: random.Random) -> Iterator[tuple[str, str]]:
    """(question, code) for each documented function of moderate length, methods included."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in old sources are not our concern
        try:
            tree = ast.parse(text)
        except (SyntaxError, ValueError):
            return  # the library ships templates and deliberately broken files
    lines = text.splitlines(keepends=True)
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        doc = ast.get_docstring(node)
        code = textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno])).rstrip()
        if doc and len(code) <= _MAX_ANSWER_CHARS:
            summary = " ".join(doc.split("\n\n")[0].split())
            yield rng.choice(_ASKS).format(name=node.name, doc=summary), code


def _conversation(pairs: list[tuple[str, str]], rng: random.Random) -> str:
    """One to three turns about one module, as `CHAT_TEMPLATE` renders them, without the leading <bos>."""
    turns = rng.sample(pairs, k=min(len(pairs), rng.choice((1, 1, 2, 3))))
    if rng.randrange(_SMALL_TALK_ONE_IN) == 0:
        turns.insert(0, (rng.choice(_GREETINGS), _SELF_DESCRIPTION))
    system = f"{IM_START}system\nYou are a helpful assistant.{IM_END}\n" if rng.random() < 0.1 else ""
    return system + "".join(
        f"{IM_START}user\n{question}{IM_END}\n{IM_START}assistant\n{answer}{IM_END}\n" for question, answer in turns
    )
