"""Prompts as token ids of exact length, put together of named segments. Pure; no tokenizer is needed.

A segment is a name and a number of tokens. Equal names give equal tokens, a shorter segment is the beginning of a
longer one of that name, and different names share nothing but chance: so prompts share the prefixes they are meant to.
For servers that take only text every id becomes a word: about as many tokens as ids, and prefixes are still shared.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FIRST_TOKEN", "Segment", "TokenIds", "TokenSource", "cut", "text_of"]

TokenIds = npt.NDArray[np.uint32]

# Ids below are often single bytes and special tokens.
FIRST_TOKEN = 100
_CACHED_SEGMENTS = 8192
_MAX_CACHED_TOKENS = 2048
# Short common words; most tokenizers have each of them, with a space before it, as one token.
_TEXT = (
    "the of and to in is that for it was on are as with his they at be this from have or by one had not but what all"
    " were when we there can an your which their said if do will each about how up out them then she many some so these"
    " would other into has more her two like him see time could no make than first been its who now people my made over"
    " did down only way find use may water long little very after words called just where most know get through back"
    " much go good new write our me man too any day same right look think also around another came come work three must"
    " because does part even place well such here take why help put different away again off went old number great tell"
    " men say small every found still between name should home big give air line set own under read last never us left"
    " end along while might next sound below saw something thought both few those always show large often together"
    " asked house world going want school important until form food keep children feet land side without boy once"
    " animal life enough took four head above kind began almost live page got earth need far hand high year mother"
    " light country father let night picture being study second soon story since white ever paper hard near"
    " sentence better best"
)
_WORDS = tuple(_TEXT.split())


@dataclass(frozen=True, slots=True)
class Segment:
    """`num_tokens` tokens from the beginning of the endless row of tokens that `name` stands for."""

    name: str
    num_tokens: int


class TokenSource:
    """Turns segments into token ids in [FIRST_TOKEN, vocabulary).

    Args:
        seed: another one gives other tokens for every name.
    """

    def __init__(self, *, seed: str, vocabulary: int) -> None:
        assert vocabulary > FIRST_TOKEN, "checked where the option was read"
        self._seed = seed
        self._span = vocabulary - FIRST_TOKEN
        self._cached = lru_cache(maxsize=_CACHED_SEGMENTS)(self._draw)

    def ids(self, pieces: Iterable[Segment | TokenIds]) -> TokenIds:
        """Token ids of pieces in a row, [num_tokens] uint32; what is ids already is taken as it is."""
        rows = [self._of(piece) if isinstance(piece, Segment) else piece for piece in pieces]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def _of(self, segment: Segment) -> TokenIds:
        return self._cached(segment) if segment.num_tokens <= _MAX_CACHED_TOKENS else self._draw(segment)

    def _draw(self, segment: Segment) -> TokenIds:
        digest = hashlib.blake2b(f"{self._seed}/{segment.name}".encode(), digest_size=16).digest()
        # The raw stream of a bit generator is the same in every version of numpy; that of its distributions is not.
        raw: npt.NDArray[Any] = np.random.PCG64(int.from_bytes(digest, "little")).random_raw(segment.num_tokens)
        return (FIRST_TOKEN + raw % self._span).astype(np.uint32)


def cut(segments: Sequence[Segment], num_tokens: int) -> tuple[Segment, ...]:
    """The first `num_tokens` of them."""
    kept: list[Segment] = []
    for segment in segments:
        taken = min(segment.num_tokens, num_tokens)
        if not taken:
            break
        kept.append(segment if taken == segment.num_tokens else Segment(segment.name, taken))
        num_tokens -= taken
    return tuple(kept)


def text_of(ids: TokenIds) -> str:
    """A word for each id."""
    words, count = _WORDS, len(_WORDS)
    return " ".join([words[token % count] for token in ids.tolist()])
