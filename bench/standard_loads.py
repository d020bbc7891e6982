"""The standard loads, and the prompts and arrival times that they are made of. Pure: a seed gives the same load again.

    name   prompts                tokens in / out    arrivals
    c1     12                     256 / 64           closed loop, 1 at a time
    c8     32                     256 / 64           closed loop, 8 at a time
    c32    96                     256 / 64           closed loop, 32 at a time
    mix    30                     1024 / 96          Poisson, 0.5 per second

A closed loop sends the next request when one ends; Poisson arrivals wait for nothing. Prompts are random tokens that no
two requests share, so that no prefix cache helps.
"""

from __future__ import annotations

import random
import zlib
from dataclasses import dataclass

import tokenizers

__all__ = ["QUICK_LOADS", "STANDARD_LOADS", "Load", "arrivals_s", "seed_number", "text_of_length", "token_prompts"]

# Ids below are often single bytes and special tokens.
FIRST_TOKEN = 100
_MAX_TRIES = 50


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What is asked of a server. Exactly one of `concurrency` (closed loop) and `rate_per_s` (Poisson) is set."""

    name: str
    requests: int
    input_tokens: int
    output_tokens: int
    concurrency: int | None = None
    rate_per_s: float | None = None

    def __post_init__(self) -> None:
        assert (self.concurrency is None) != (self.rate_per_s is None), self

    @property
    def arrivals(self) -> str:
        """For people."""
        return f"{self.concurrency} at a time" if self.concurrency else f"{self.rate_per_s:g}/s"


def _loads(*, input_tokens: int, output_tokens: int, requests: tuple[int, int, int], mix: Load) -> tuple[Load, ...]:
    closed = zip((1, 8, 32), requests, strict=True)
    return (
        *(
            Load(name=f"c{n}", requests=count, input_tokens=input_tokens, output_tokens=output_tokens, concurrency=n)
            for n, count in closed
        ),
        mix,
    )


STANDARD_LOADS = _loads(
    input_tokens=256,
    output_tokens=64,
    requests=(12, 32, 96),
    mix=Load(name="mix", requests=30, input_tokens=1024, output_tokens=96, rate_per_s=0.5),
)
# The whole chain in seconds; its figures say nothing.
QUICK_LOADS = _loads(
    input_tokens=32,
    output_tokens=8,
    requests=(2, 8, 32),
    mix=Load(name="mix", requests=6, input_tokens=64, output_tokens=12, rate_per_s=4.0),
)


def seed_number(seed: str) -> int:
    """A number below 2**31 for clients that take no text as seed."""
    return zlib.crc32(seed.encode()) >> 1


def token_prompts(load: Load, *, vocabulary: int, seed: str) -> list[list[int]]:
    """One list of token ids in [FIRST_TOKEN, vocabulary) for each request."""
    generator = random.Random(seed)
    return [
        [generator.randrange(FIRST_TOKEN, vocabulary) for _ in range(load.input_tokens)] for _ in range(load.requests)
    ]


def arrivals_s(load: Load, *, seed: str) -> list[float]:
    """When each request of a load with a rate is sent, in seconds from the first."""
    assert load.rate_per_s is not None
    generator = random.Random(seed)
    times_s = [0.0]
    while len(times_s) < load.requests:
        times_s.append(times_s[-1] + generator.expovariate(load.rate_per_s))
    return times_s


def text_of_length(tokens: list[int], tokenizer: tokenizers.Tokenizer, *, vocabulary: int, seed: str) -> str:
    """A text of as many tokens as `tokens`, and of these where they survive decoding and encoding.

    Raises:
        ValueError: no such text was found.
    """
    generator = random.Random(seed)
    ids = list(tokens)
    for _ in range(_MAX_TRIES):
        text: str = tokenizer.decode(ids, skip_special_tokens=False)
        again = tokenizer.encode(text, add_special_tokens=False).ids
        if len(again) == len(tokens):
            return text
        # Bytes that are no text become others, more or fewer: cut, or fill up, and look again.
        ids = again[: len(tokens)]
        ids += [generator.randrange(FIRST_TOKEN, vocabulary) for _ in range(len(tokens) - len(ids))]
    raise ValueError(f"no text of exactly {len(tokens)} tokens within {_MAX_TRIES} tries; give a server that takes ids")
