"""Whether a device computes the right tokens: against transformers on that device, and disaggregated against local.

    python bench/gpu_exact.py [--device cuda] [--dtypes float32,bfloat16] [--prompts 12] [--tokens 32]

On the model that ships and on a random Llama whose logits spread:

transformers   Greedy tokens of prompts of mixed lengths, all running at once. transformers reads each answer in one go
               and says at every position how far the token lies below its own first choice. A token may be another one
               only where the two are as close as rounding makes them; such ties are counted.
disaggregated  The same prompts one by one: by one engine alone, and prefilled here, decoded in another process on the
               same device, pages handed over by cuda_ipc (shm on a CPU). All tokens must be equal.
in company     What the engine wrote alone and with all at once; equal where it promises that.
"""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch

from gpu_device import resolve_device
from gpu_pair import Setting, greedy_request, open_engine, tokens_of_pair
from gpu_progress import Progress
from gpu_rows import Row, table

from baton.engine.engine import Engine  # isort: skip

TINY = Path(__file__).parent.parent / "src" / "baton" / "assets" / "tiny"
LENGTHS = (1, 2, 7, 15, 16, 17, 33, 64, 100, 129, 200, 333)
# How far below transformers' first choice a token may lie, as a share of the spread of the logits at its position.
TIE = {"float32": 5e-4, "bfloat16": 0.05, "float16": 0.01}


@dataclass(frozen=True, slots=True)
class Verdict:
    """What transformers says of an answer: tokens that are its first choice, that tie with it, and that are wrong."""

    equal: int
    ties: int
    wrong: int


def write_random_llama(folder: Path) -> Path:
    """A small Llama of random weights whose logits spread over several units."""
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=2048,
        hidden_size=512,
        intermediate_size=1000,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2048,
        rope_theta=10000.0,
        bos_token_id=0,
        eos_token_id=1,
        tie_word_embeddings=False,
    )
    model = transformers.LlamaForCausalLM(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_vector = parameter.dim() == 1
            fan_in = parameter.shape[-1]
            parameter.copy_(
                1.0 + 0.1 * noise if is_vector else noise * (2.0 if "lm_head" in name else 1.0) / fan_in**0.5
            )
    model.save_pretrained(folder)
    return folder


def all_at_once(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    """Greedy tokens of every prompt, as many running at once as the engine takes."""
    answers: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        answers[f"local-{number}"] = []
        refusal = engine.add(greedy_request(f"local-{number}", prompt, max_tokens))
        assert not refusal, refusal
    while engine.has_work:
        for output in engine.step().outputs:
            assert not output.error, output.error
            answers[output.request_id] += output.token_ids
    return list(answers.values())


@torch.inference_mode()
def judge(model: Any, prompt: list[int], tokens: list[int], tie: float) -> Verdict:
    """Reads prompt and answer in one go."""
    ids = torch.tensor([prompt + tokens[:-1]], device=model.device)
    logits = model(ids).logits[0, len(prompt) - 1 :].double()
    chosen = logits.gather(1, torch.tensor(tokens, device=logits.device).unsqueeze(1)).squeeze(1)
    below = (logits.max(1).values - chosen) / logits.std(1)
    # NaN is neither equal nor a tie.
    equal, ties = int((below <= 0).sum()), int(((below > 0) & (below <= tie)).sum())
    return Verdict(equal, ties, len(tokens) - equal - ties)


def check(name: str, folder: Path, device: torch.device, dtype: str, num_prompts: int, max_tokens: int) -> list[Row]:
    """Both rows of one model in one dtype."""
    import transformers

    transport = "cuda_ipc" if device.type == "cuda" else "shm"
    setting = Setting(folder=str(folder), device=str(device), dtype=dtype, transport=transport)
    reference = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype)).to(device).eval()
    generator = random.Random(5)
    lengths = [LENGTHS[at % len(LENGTHS)] for at in range(num_prompts)]
    prompts = [generator.choices(range(reference.config.vocab_size), k=length) for length in lengths]
    engine = open_engine(setting)
    together = all_at_once(engine, prompts, max_tokens)
    verdicts = [judge(reference, p, tokens, TIE[dtype]) for p, tokens in zip(prompts, together, strict=True)]
    engine.pool.clear_cache()
    alone = [all_at_once(engine, [prompt], max_tokens)[0] for prompt in prompts]
    pair = tokens_of_pair(setting, prompts, max_tokens)
    wrong = sum(a != b for own, other in zip(alone, pair, strict=True) for a, b in zip(own, other, strict=True))
    moved = sum(a != b for x, y in zip(alone, together, strict=True) for a, b in zip(x, y, strict=True))
    total = num_prompts * max_tokens
    row = {"model": name, "dtype": dtype, "tokens": total}
    return [
        {
            **row,
            "against": "transformers",
            "equal": sum(verdict.equal for verdict in verdicts),
            "ties": sum(verdict.ties for verdict in verdicts),
            "wrong": sum(verdict.wrong for verdict in verdicts),
        },
        {**row, "against": f"local, by {transport}", "equal": total - wrong, "ties": 0, "wrong": wrong},
        {**row, "against": "alone, in company", "equal": total - moved, "wrong": moved},
    ]


def main() -> int:
    """Prints a table; returns 1 where a token is wrong."""
    import transformers

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--dtypes", default="float32,bfloat16")
    parser.add_argument("--models", default="tiny,random")
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=32)
    options = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    device = resolve_device(options.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", 0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as scratch:
        folders = {"tiny": TINY}
        if "random" in options.models.split(","):
            folders["random"] = write_random_llama(Path(scratch) / "random")
        works = [(name, dtype) for name in options.models.split(",") for dtype in options.dtypes.split(",")]
        progress = Progress(len(works))
        for name, dtype in works:
            progress.step(f"{name}, {dtype}")
            rows += check(name, folders[name], device, dtype, options.prompts, options.tokens)
        progress.end()
    print(table(("model", "dtype", "against", "tokens", "equal", "ties", "wrong"), rows))
    wrong = [row for row in rows if row["wrong"]]
    print(f"{len(wrong)} of {len(rows)} runs gave wrong tokens" if wrong else "no wrong token")
    return 1 if wrong else 0


if __name__ == "__main__":
    raise SystemExit(main())
