"""Closed-loop load on an OpenAI-compatible URL: N streams at a time, fixed prompt and output lengths.

Usage: python bench/streams.py URL --concurrency 1 8 32 [--input-tokens 256] [--output-tokens 64] [--rounds 3]

Prompts are random token ids (so any server that takes token ids can be compared), never repeated, so that no prefix
cache helps. Prints one row per concurrency: output tokens per second, TTFT, TPOT and inter-token percentiles.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import time
from dataclasses import dataclass, field

import httpx


@dataclass
class Stream:
    """Times of one request, in seconds on one clock."""

    begin_s: float
    tokens: int = 0
    at_s: list[float] = field(default_factory=list)


def percentile(values: list[float], share: float) -> float:
    """The value that `share` of all values do not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else 0.0


async def one(client: httpx.AsyncClient, url: str, model: str, prompt: list[int], output_tokens: int) -> Stream:
    """Sends one request and notes when each chunk comes."""
    body = {
        "model": model,
        "prompt": prompt,
        "max_tokens": output_tokens,
        "temperature": 0,
        "ignore_eos": True,
        "return_token_ids": True,  # a chunk for every token, also where its text must wait for the next one
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    stream = Stream(time.perf_counter())
    async with client.stream("POST", f"{url}/v1/completions", json=body) as response:
        response.raise_for_status()
        async for line in response.aiter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            chunk = json.loads(line[6:])
            if chunk.get("usage"):
                stream.tokens = chunk["usage"]["completion_tokens"]
            if chunk["choices"]:
                stream.at_s.append(time.perf_counter())
    assert stream.tokens == output_tokens, f"{stream.tokens} tokens instead of {output_tokens}"
    return stream


async def load(url: str, concurrency: int, requests: int, input_tokens: int, output_tokens: int, seed: int) -> None:
    """Runs `requests` requests, `concurrency` at a time, and prints one row."""
    generator = random.Random(seed)
    limits = httpx.Limits(max_connections=concurrency + 4)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        model = (await client.get(f"{url}/v1/models")).json()["data"][0]["id"]
        prompts = [[generator.randrange(100, 4000) for _ in range(input_tokens)] for _ in range(requests)]
        streams: list[Stream] = []

        async def worker() -> None:
            while prompts:
                streams.append(await one(client, url, model, prompts.pop(), output_tokens))

        begin_s = time.perf_counter()
        await asyncio.gather(*(worker() for _ in range(concurrency)))
        wall_s = time.perf_counter() - begin_s
    first = [s.at_s[0] - s.begin_s for s in streams]
    each = [(s.at_s[-1] - s.at_s[0]) / max(1, s.tokens - 1) for s in streams]
    gaps = [b - a for s in streams for a, b in zip(s.at_s, s.at_s[1:], strict=False)]
    print(
        f"c{concurrency:<3} {sum(s.tokens for s in streams) / wall_s:8.1f} tok/s"
        f"  TTFT mean {statistics.mean(first) * 1e3:7.1f} p99 {percentile(first, 0.99) * 1e3:7.1f} ms"
        f"  TPOT median {statistics.median(each) * 1e3:6.1f} ms"
        f"  ITL p99 {percentile(gaps, 0.99) * 1e3:6.1f} ms  ({len(streams)} requests)",
        flush=True,
    )


def main() -> None:
    """Parses the command line and runs each concurrency in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="requests per stream")
    options = parser.parse_args()
    asyncio.run(load(options.url, 1, 1, options.input_tokens, options.output_tokens, 99))
    for concurrency in options.concurrency:
        requests = concurrency * options.rounds
        asyncio.run(load(options.url, concurrency, requests, options.input_tokens, options.output_tokens, concurrency))


if __name__ == "__main__":
    main()
