"""The floor to beat: one stream of transformers' `generate` on the same model, prompt and output lengths.

Usage: python bench/transformers_generate.py MODEL_DIR [--threads N] [--input-tokens 256] [--output-tokens 64]
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
from transformers import AutoModelForCausalLM


def main() -> None:
    """Prints the median of the runs after one warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--input-tokens", type=int, default=256)
    parser.add_argument("--output-tokens", type=int, default=64)
    parser.add_argument("--runs", type=int, default=5)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype="auto").eval()
    generator = torch.Generator().manual_seed(1)
    rates = []
    for run in range(1 + options.runs):
        prompt = torch.randint(100, 4000, (1, options.input_tokens), generator=generator)
        begin_s = time.perf_counter()
        output = model.generate(
            prompt, max_new_tokens=options.output_tokens, min_new_tokens=options.output_tokens, do_sample=False
        )
        assert output.shape[1] == options.input_tokens + options.output_tokens
        if run:
            rates.append(options.output_tokens / (time.perf_counter() - begin_s))
    print(
        f"transformers generate, {options.threads} threads: median {statistics.median(rates):.1f} tok/s of {len(rates)}"
    )


if __name__ == "__main__":
    main()
