"""Trains the two models that ship with Baton, on nothing but the standard library of the interpreter that runs this.

    python tools/train_tiny.py tiny  --minutes 60        # by the clock; stop and run again to resume
    python tools/train_tiny.py draft --minutes 15
    python tools/train_tiny.py tiny  --steps 1000        # by steps: a fixed seed then fixes the whole run
    python tools/train_tiny.py tiny  --export-only       # write the last checkpoint to src/baton/assets

State: `--work` holds the tokenizer, the token ids and one checkpoint per model; the assets are written from there.
Each process is one rank with one thread; all hold the whole model and average their gradients, because on a CPU this
shares no lock inside a step and so survives busy neighbours far better than two threads in each operator.
Training is fp32 throughout (not every CPU multiplies bf16 at speed); the export is bf16.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
import time
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import tiny_corpus
import tiny_export
import torch
import torch.distributed as dist
from muon import Muon
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from tokenizers import Tokenizer
from torch import Tensor
from torch.multiprocessing.spawn import spawn
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM

MAX_POSITIONS = 2048
GOLDEN_RATIO = (math.sqrt(5) - 1) / 2
WARMUP_STEPS = 40
DECAY_FROM = 0.75  # of the budget: constant learning rate before, linear to zero after
BATCH_TOKENS = 2048  # or one sequence a rank where that is more
SEQUENCE_LENGTHS = ((0.0, 256), (0.65, 512), (0.9, MAX_POSITIONS))  # (from this share of the budget, tokens a sequence)
EVALUATE_WINDOWS, EVALUATE_LENGTH = 32, 512
REPORT_STEPS, EVALUATE_STEPS, CHECKPOINT_S = 20, 200, 120.0
COLLECTIVE_TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a Llama and the learning rate that suits them."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    learning_rate: float

    def config(self) -> LlamaConfig:
        return LlamaConfig(
            vocab_size=tiny_corpus.VOCAB_SIZE,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.hidden // self.heads,
            max_position_embeddings=MAX_POSITIONS,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=tiny_corpus.SPECIAL_TOKENS.index(tiny_corpus.BOS),
            eos_token_id=tiny_corpus.SPECIAL_TOKENS.index(tiny_corpus.EOT),
            pad_token_id=tiny_corpus.SPECIAL_TOKENS.index(tiny_corpus.PAD),
        )


SHAPES = {
    "tiny": Shape(hidden=256, intermediate=704, layers=6, heads=8, kv_heads=4, learning_rate=4e-3),
    "draft": Shape(hidden=128, intermediate=352, layers=3, heads=4, kv_heads=2, learning_rate=6e-3),
}


@dataclass(slots=True)
class Run:
    """What a checkpoint counts. `windows` is the position in the fixed sequence of training windows.

    `budgets` are the arguments of the invocations that gave the run another budget, in order.
    """

    step: int = 0
    windows: int = 0
    tokens: int = 0
    elapsed_s: float = 0.0
    train_loss: float = math.nan  # mean of the last `REPORT_STEPS` steps, nats a token
    validation_loss: float = math.nan
    budgets: list[str] = field(default_factory=list)

    def progress(self, minutes: float | None, steps: int | None) -> float:
        """The share of the budget that is used, in [0, 1]."""
        return min(1.0, self.step / steps if steps is not None else self.elapsed_s / (60 * (minutes or 1)))


class Trainer:
    """One rank: the model, its optimisers and the run's counters. All ranks hold the same state after every step."""

    def __init__(self, shape: Shape, seed: int) -> None:
        torch.manual_seed(seed)
        self.shape, self.run = shape, Run()
        self.model = LlamaForCausalLM(shape.config())
        parameters = list(self.model.parameters())
        self.gradient = torch.zeros(sum(p.numel() for p in parameters))
        for p, g in zip(parameters, self.gradient.split([p.numel() for p in parameters]), strict=True):
            p.grad = g.view_as(p)  # one flat buffer: one all-reduce, one norm
        inner = [p for n, p in self.model.named_parameters() if p.ndim == 2 and "embed" not in n]
        outer = [p for n, p in self.model.named_parameters() if p.ndim != 2 or "embed" in n]
        self.muon = Muon(inner)
        self.adam = torch.optim.AdamW(outer, lr=shape.learning_rate, betas=(0.9, 0.95), weight_decay=0.0)

    def step(self, tokens: np.ndarray, progress: float) -> float:
        """One optimiser step on `BATCH_TOKENS` of `tokens`; the mean loss over all ranks, in nats a token."""
        rank, world = dist.get_rank(), dist.get_world_size()
        length = next(n for start, n in reversed(SEQUENCE_LENGTHS) if progress >= start)
        rows = max(world, BATCH_TOKENS // length)
        batch = _windows(tokens, self.run.windows, rows, length)[rank::world]
        loss = _loss(self.model, batch)
        self.gradient.zero_()
        loss.backward()
        dist.all_reduce(self.gradient)
        self.gradient.div_(world)
        self.gradient.mul_((1.0 / self.gradient.norm().clamp(min=1.0)).item())  # clip the norm to 1
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        learning_rate = self.shape.learning_rate * self._decay(progress)
        self.muon.step(learning_rate)
        self.adam.param_groups[0]["lr"] = learning_rate
        self.adam.step()
        self.run.step += 1
        self.run.windows += rows
        self.run.tokens += rows * length
        return mean.item() / world

    def _decay(self, progress: float) -> float:
        warmup = min(1.0, (self.run.step + 1) / WARMUP_STEPS)
        return warmup * max(0.02, min(1.0, (1 - progress) / (1 - DECAY_FROM)))

    def state(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "muon": self.muon.buffer,
            "adam": self.adam.state_dict(),
            "run": asdict(self.run),
        }

    def load_state(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(state["model"])
        self.muon.buffer.copy_(state["muon"])
        self.adam.load_state_dict(state["adam"])
        self.run = Run(**state["run"])


def _windows(tokens: np.ndarray, first: int, rows: int, length: int) -> Tensor:
    """Windows `first` to `first + rows` of the run as `[rows, length + 1]` int64.

    Their starts are multiples of the golden ratio modulo the corpus: they cover it evenly at every moment, neighbours
    in a batch are far apart in the text, and a resumed run needs no generator state.
    """
    starts = [int((k * GOLDEN_RATIO) % 1.0 * (len(tokens) - length - 1)) for k in range(first, first + rows)]
    return torch.from_numpy(np.stack([tokens[s : s + length + 1] for s in starts]).astype(np.int64))


def _loss(model: LlamaForCausalLM, batch: Tensor) -> Tensor:
    logits = model(input_ids=batch[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


@torch.no_grad()
def evaluate(model: LlamaForCausalLM, tokens: np.ndarray, windows: int, length: int) -> float:
    """The mean loss over `windows` windows spread evenly over `tokens`, in nats a token."""
    return sum(_loss(model, _windows(tokens, i, 1, length)).item() for i in range(windows)) / windows


def prepare_data(work: Path, seed: int) -> dict[str, int]:
    """Write the tokenizer and the token ids into `work` unless they are there; the counts for the card."""
    facts_file = work / "corpus.json"
    if not facts_file.exists():
        sources = tiny_corpus.read_sources()
        tokenizer = tiny_corpus.train_tokenizer(s.text for s in sources if not s.is_held_out)
        corpus = tiny_corpus.build_corpus(sources, tokenizer, seed)
        tokenizer.save(str(work / "tokenizer.json"))
        np.save(work / "train.npy", corpus.train)
        np.save(work / "validation.npy", corpus.validation)
        counts = {
            "train_tokens": len(corpus.train),
            "validation_tokens": len(corpus.validation),
            "train_files": corpus.num_train_files,
            "validation_files": corpus.num_validation_files,
            "chats": corpus.num_chats,
            "seed": seed,
        }
        facts_file.write_text(json.dumps(counts))
    facts: dict[str, int] = json.loads(facts_file.read_text())
    if facts["seed"] != seed:
        raise SystemExit(f"{work} was prepared with seed {facts['seed']}, not {seed}: choose another --work")
    return facts


def train(rank: int, options: argparse.Namespace) -> None:
    """The whole life of one rank; rank 0 alone keeps the clock, the checkpoint and the screen."""
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{options.rendezvous}",
        rank=rank,
        world_size=options.processes,
        timeout=COLLECTIVE_TIMEOUT,
    )
    tokens = np.load(options.work / "train.npy", mmap_mode="r")
    held_out = np.load(options.work / "validation.npy")
    trainer = Trainer(SHAPES[options.model], options.seed)
    checkpoint = options.work / f"{options.model}.pt"
    if checkpoint.exists():
        trainer.load_state(torch.load(checkpoint, weights_only=True))
    run, is_first = trainer.run, rank == 0
    budget = f"--minutes {options.minutes:g}" if options.steps is None else f"--steps {options.steps}"
    if budget not in run.budgets:
        run.budgets.append(budget)
    losses: deque[float] = deque(maxlen=REPORT_STEPS)
    last_time = last_save = time.monotonic()
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[report]}"), TimeElapsedColumn())
    with Progress(*columns, disable=not is_first, refresh_per_second=1) as screen:
        bar = screen.add_task(options.model, total=1.0, report="")
        while True:
            share = torch.tensor([run.progress(options.minutes, options.steps)], dtype=torch.float64)
            dist.broadcast(share, 0)
            if share.item() >= 1.0:
                break
            losses.append(trainer.step(tokens, share.item()))
            now = time.monotonic()
            run.elapsed_s += now - last_time
            last_time = now
            if not is_first:
                continue
            if run.step % REPORT_STEPS == 0:
                run.train_loss = sum(losses) / len(losses)
                rate = run.tokens / run.elapsed_s
                report = f"loss {run.train_loss:.3f}  validation {run.validation_loss:.3f}  {rate:.0f} tok/s"
                screen.update(bar, completed=share.item(), report=f"step {run.step}  {report}")
                with (options.work / f"{options.model}.jsonl").open("a") as log:
                    log.write(json.dumps(asdict(run)) + "\n")
            if run.step % EVALUATE_STEPS == 0:
                run.validation_loss = evaluate(trainer.model, held_out, EVALUATE_WINDOWS, EVALUATE_LENGTH)
            if now - last_save > CHECKPOINT_S:
                _save(trainer, checkpoint)
                last_save = time.monotonic()
        if is_first:
            run.validation_loss = evaluate(trainer.model, held_out, len(held_out) // EVALUATE_LENGTH, EVALUATE_LENGTH)
            _save(trainer, checkpoint)
            screen.update(bar, completed=1.0, report=f"validation {run.validation_loss:.3f}")
    dist.barrier()
    dist.destroy_process_group()


def _save(trainer: Trainer, checkpoint: Path) -> None:
    partial = checkpoint.with_suffix(".partial")
    torch.save(trainer.state(), partial)
    os.replace(partial, checkpoint)


def export(options: argparse.Namespace, corpus: dict[str, int]) -> None:
    """Write the checkpoint as a Hugging Face folder; an unfinished run is called early in its card."""
    state = torch.load(options.work / f"{options.model}.pt", weights_only=True)
    run = Run(**state["run"])
    model = LlamaForCausalLM(SHAPES[options.model].config())
    model.load_state_dict(state["model"])
    is_finished = run.progress(options.minutes, options.steps) >= 1.0
    facts = tiny_export.Facts(
        name=options.model,
        commands=[f"python tools/train_tiny.py {options.model} {budget}" for budget in run.budgets],
        validation="all held-out files" if is_finished else f"{EVALUATE_WINDOWS} windows of the held-out files",
        is_finished=is_finished,
        run=asdict(run),
        corpus=corpus,
    )
    tokenizer = Tokenizer.from_file(str(options.work / "tokenizer.json"))
    tiny_export.write_folder(options.assets / options.model, model, tokenizer, facts)


def parse_options() -> argparse.Namespace:
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=sorted(SHAPES))
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--minutes", type=float, default=60.0, help="training time in all, resumed runs included")
    budget.add_argument("--steps", type=int, help=f"optimiser steps of {BATCH_TOKENS} tokens, instead of --minutes")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2, help="ranks, each with one thread")
    parser.add_argument("--work", type=Path, default=root / "build" / "train_tiny")
    parser.add_argument("--assets", type=Path, default=root / "src" / "baton" / "assets")
    parser.add_argument("--export-only", action="store_true")
    options = parser.parse_args()
    if options.processes not in (1, 2, 4):
        parser.error(f"--processes must be 1, 2 or 4 so that every rank gets as many rows, got {options.processes}")
    return options


def main() -> None:
    options = parse_options()
    options.work.mkdir(parents=True, exist_ok=True)
    corpus = prepare_data(options.work, options.seed)
    if not options.export_only:
        with tempfile.TemporaryDirectory(prefix="train-tiny-") as folder:
            options.rendezvous = Path(folder) / "rendezvous"
            spawn(train, args=(options,), nprocs=options.processes)
    export(options, corpus)


if __name__ == "__main__":
    main()
