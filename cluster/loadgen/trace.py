"""Traces of real traffic, and the requests that they become. Pure.

    JSON lines   {"timestamp": ms, "input_length": tokens, "output_length": tokens, "hash_ids": [...]}
    CSV          TIMESTAMP,ContextTokens,GeneratedTokens

`hash_ids` name the prompt's blocks of 512 tokens: prompts whose lists begin alike begin with the same tokens. A length
scale shortens the blocks and leaves that as it is: 1/16 makes blocks of 32 tokens. Rows without `hash_ids` share
nothing.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import chain, islice

from baton.cluster.loadgen.prompts import Segment
from baton.errors import ConfigError

__all__ = ["BLOCK_TOKENS", "TraceRow", "read_trace", "rescale", "segments_of"]

BLOCK_TOKENS = 512


@dataclass(frozen=True, slots=True)
class TraceRow:
    """One request as it was seen; `at_s` since the first one."""

    at_s: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] | None


def read_trace(lines: Iterable[str], *, name: str, limit: int) -> list[TraceRow]:
    """The first `limit` rows, in the order of their times.

    Raises:
        ConfigError: a line that is none, with its number.
    """
    text = iter(lines)
    first = next(text, "")
    rows: list[TraceRow] = []
    if first.lstrip().startswith("{"):
        for number, line in enumerate(islice(chain([first], text), limit), 1):
            rows.append(_json_row(line, f"{name}:{number}"))
    else:
        for number, values in enumerate(islice(csv.DictReader(chain([first], text)), limit), 2):
            rows.append(_csv_row(values, f"{name}:{number}"))
    if not rows:
        raise ConfigError(f"{name} holds no requests")
    rows.sort(key=lambda row: row.at_s)
    begin_s = rows[0].at_s
    return [TraceRow(row.at_s - begin_s, row.input_tokens, row.output_tokens, row.hash_ids) for row in rows]


def _json_row(line: str, where: str) -> TraceRow:
    try:
        value = json.loads(line)
        ids = value.get("hash_ids")
        row = TraceRow(
            float(value["timestamp"]) / 1e3,
            int(value["input_length"]),
            int(value["output_length"]),
            None if ids is None else tuple(int(number) for number in ids),
        )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{where} is no request of a trace ({error}): {line[:80].strip()!r}") from error
    blocks = -(-row.input_tokens // BLOCK_TOKENS)
    if row.input_tokens < 1 or row.output_tokens < 0 or (row.hash_ids is not None and len(row.hash_ids) != blocks):
        raise ConfigError(
            f"{where} must have input_length of at least 1 and {blocks} hash_ids, one for each {BLOCK_TOKENS} tokens"
        )
    return row


def _csv_row(values: dict[str, str], where: str) -> TraceRow:
    try:
        at = datetime.fromisoformat(values["TIMESTAMP"][:26])
        return TraceRow(at.timestamp(), int(values["ContextTokens"]), int(values["GeneratedTokens"]), None)
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{where} must have TIMESTAMP, ContextTokens and GeneratedTokens ({error})") from error


def rescale(rows: Sequence[TraceRow], *, rate_per_s: float | None, time_scale: float) -> list[float]:
    """When each row is sent, in seconds: at the mean rate `rate_per_s`, else at its time times `time_scale`."""
    if rate_per_s is not None and len(rows) > 1 and rows[-1].at_s > 0:
        time_scale = (len(rows) - 1) / rate_per_s / rows[-1].at_s
    return [row.at_s * time_scale for row in rows]


def segments_of(row: TraceRow, index: int, length_scale: float) -> tuple[Segment, ...]:
    """A row's prompt, a segment for each block; `index` tells rows without `hash_ids` apart."""
    if row.hash_ids is None:
        return (Segment(f"row {index}", max(1, round(row.input_tokens * length_scale))),)
    block = max(1, round(BLOCK_TOKENS * length_scale))
    last = row.input_tokens - BLOCK_TOKENS * (len(row.hash_ids) - 1)
    lengths = [block] * (len(row.hash_ids) - 1) + [min(block, max(1, round(last * length_scale)))]
    return tuple(Segment(f"block {hash_id}", length) for hash_id, length in zip(row.hash_ids, lengths, strict=True))
