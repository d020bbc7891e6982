"""Closed-loop load on an OpenAI-compatible URL: N streams at a time, fixed prompt and output lengths.

Usage: python bench/streams.py URL --concurrency 1 8 32 [--input-tokens 256] [--output-tokens 64] [--rounds 3]

Prompts are random token ids (so any server that takes token ids can be compared), never repeated, so that no prefix
cache helps. Prints one row per concurrency: output tokens per second, TTFT, TPOT and inter-token percentiles.
`bench/compare.py` compares several servers with the same client.
"""

from __future__ import annotations

import argparse
import asyncio

from load_client import Server, describe, run_load
from load_figures import Figures
from standard_loads import Load, token_prompts

VOCABULARY = 4000


def run(server: Server, load: Load, seed: int) -> Figures:
    """Sends a load once."""
    prompts = token_prompts(load, vocabulary=VOCABULARY, seed=f"{load.name}/{seed}")
    return Figures.of(asyncio.run(run_load(server, load, prompts)))


def main() -> None:
    """Parses the command line and runs each concurrency in turn."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--concurrency", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3, help="requests per stream")
    parser.add_argument("--seed", type=int, default=1, help="another one makes other prompts")
    options = parser.parse_args()
    server = describe(options.url.rstrip("/").removesuffix("/v1"))

    def load(concurrency: int, requests: int) -> Load:
        return Load(
            name=f"c{concurrency}",
            requests=requests,
            input_tokens=options.input_tokens,
            output_tokens=options.output_tokens,
            concurrency=concurrency,
        )

    run(server, load(1, 1), options.seed - 1)
    for concurrency in options.concurrency:
        row = run(server, load(concurrency, concurrency * options.rounds), options.seed)
        print(
            f"c{concurrency:<3} {row.output_tokens_per_s:8.1f} tok/s"
            f"  TTFT mean {row.ttft_mean_ms:7.1f} p99 {row.ttft_p99_ms:7.1f} ms"
            f"  TPOT median {row.tpot_median_ms:6.1f} ms"
            f"  ITL p99 {row.itl_p99_ms:6.1f} ms  ({row.requests} requests)",
            flush=True,
        )


if __name__ == "__main__":
    main()
