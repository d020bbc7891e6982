"""What a request may take of its tenant's token rate, before anything is encoded for it: pure."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

__all__ = ["TokenBounds"]

_CHARS_PER_TOKEN = 4
"""Of common text and vocabularies, roughly."""


@dataclass(frozen=True, slots=True)
class TokenBounds:
    """Prompt and maximal output tokens of all answers.

    Attributes:
        least: it takes no fewer.
        likely: for the hint when to come again.
    """

    least: int
    likely: int

    @staticmethod
    def of(prompts: Iterable[str | Sequence[int]], *, answers: int, max_tokens: int | None) -> TokenBounds:
        """Of so many answers to each prompt, which is text or ids; `max_tokens` None: not said, one at least."""
        least = likely = 0
        for prompt in prompts:
            is_text = isinstance(prompt, str)
            least += 1 if is_text else len(prompt)
            likely += max(len(prompt) // _CHARS_PER_TOKEN, 1) if is_text else len(prompt)
            least, likely = least + (max_tokens or 1), likely + (max_tokens or 1)
        return TokenBounds(answers * least, answers * likely)
