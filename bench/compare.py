"""Compares Baton with any OpenAI-compatible servers: same client, same prompts, same machine, in turn.

Usage:
    python bench/compare.py --model DIR --baton NAME='OPTIONS OF baton up' --peer NAME='COMMAND with {port}' ...
    python bench/compare.py --baton URL --peer NAME=URL ... [--loads c8 mix] [--rounds 3] [--quick]
    python bench/compare.py --redraw OUT.json

For example, with the model of `bench/make_model.py` and servers that are installed elsewhere:

    python bench/compare.py --model DIR --out compare \\
        --baton disaggregated='--set prefill.replicas=1 --set decode.replicas=1' \\
        --peer vllm='path/to/vllm serve DIR --port {port}' \\
        --peer llama.cpp='path/to/llama-server -m FILE.gguf --port {port} -np 32'

Every round measures all systems one after another, so that a machine that drifts drifts for all. A system that is given
as a command is started for its turn alone and stopped after it; one that is given as a URL keeps running, and must be
idle and leave the cores alone when it is not asked. Repeat `--baton` and `--peer` for more systems or settings.

The loads are those of standard_loads.py. Prompts differ between loads and rounds, so that no prefix cache helps, and
are the same for every system: token ids where a server takes them, else text of as many tokens. Temperature is 0 and
the end of text is ignored. Before each turn a few requests warm the server up.

The client is `vllm bench serve` where `--vllm` names it or it is on PATH (it makes its own prompts, text of random
tokens, the same for every system), else our own; `--client` chooses. The table says which.

Writes a Markdown table to stdout (medians of the rounds, start-up times, ratios to the best peer of each load), all
rounds to OUT.json after every turn, and throughput against latency to OUT.png, if matplotlib is there (extra `bench`).
With `--log-dir` what the commands write is kept. Exit status 1 when anything failed; the rest is still measured.
"""

from __future__ import annotations

import argparse
import asyncio
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import tokenizers

from compare_report import Comparison, write_chart, write_table
from load_client import LoadError, Server, run_load
from load_figures import Figures, Run
from quiet_machine import CpuTimes, describe_machine, others_cores
from served_system import System, parse_baton, parse_peer, serving
from standard_loads import QUICK_LOADS, STANDARD_LOADS, Load, arrivals_s, text_of_length, token_prompts
from vllm_client import find_vllm, run_vllm_load

# What others may take without a word about it: cores before a turn, a share of all cores during one.
QUIET_CORES = 0.1
QUIET_STOLEN = 0.01
DEFAULT_VOCABULARY = 4000
WARM_UP = Load(name="warm-up", requests=8, input_tokens=256, output_tokens=16, concurrency=8)


class Client:
    """Runs a load by one of the two clients. `vllm` is the path of the outside one, None takes our own."""

    def __init__(self, *, vllm: str | None, model: Path | None) -> None:
        self._vllm = vllm
        self._model = model
        self._tokenizer = tokenizers.Tokenizer.from_file(str(model / "tokenizer.json")) if model else None

    @property
    def name(self) -> str:
        """For the table."""
        if self._vllm is None:
            return "our own"
        shown = subprocess.run([self._vllm, "--version"], capture_output=True, text=True, timeout=120, check=False)
        version = (shown.stdout.strip().splitlines() or ["of unknown version"])[-1]
        return f"vllm bench serve {version}"

    def warm_up(self, server: Server, load: Load, seed: str) -> None:
        """A few requests by our own client, no longer than those of `load`, whichever client measures."""
        shorter = min(WARM_UP.input_tokens, load.input_tokens), min(WARM_UP.output_tokens, load.output_tokens)
        self._run_own(server, replace(WARM_UP, input_tokens=shorter[0], output_tokens=shorter[1]), f"{seed}/warm-up")

    def run(self, server: Server, load: Load, seed: str) -> Run:
        """One load; the same prompts for the same seed.

        Raises:
            LoadError: not every request was served in full.
        """
        if self._vllm is None:
            return self._run_own(server, load, seed)
        assert self._model is not None, "checked when the options were read"
        return run_vllm_load(self._vllm, server, load, tokenizer=self._model, seed=seed)

    def _run_own(self, server: Server, load: Load, seed: str) -> Run:
        vocabulary = self._tokenizer.get_vocab_size() if self._tokenizer else DEFAULT_VOCABULARY
        prompts: Sequence[list[int] | str] = token_prompts(load, vocabulary=vocabulary, seed=seed)
        if not server.takes_token_ids:
            if self._tokenizer is None:
                raise LoadError(f"{server.url} takes no token ids as prompt: --model is needed to write text instead")
            prompts = [
                text_of_length(ids, self._tokenizer, vocabulary=vocabulary, seed=f"{seed}/{index}")
                for index, ids in enumerate(token_prompts(load, vocabulary=vocabulary, seed=seed))
            ]
        arrivals = arrivals_s(load, seed=seed) if load.rate_per_s else None
        return asyncio.run(run_load(server, load, prompts, arrivals))


def measure(found: Comparison, systems: Sequence[System], client: Client, options: argparse.Namespace) -> None:
    """All rounds into `found`; what fails is noted there, and the next system has its turn."""
    for number in range(1, options.rounds + 1):
        for system in systems:
            turn = f"round {number} of {options.rounds}, {system.name}"
            if (cores := others_cores()) > QUIET_CORES:
                found.busy.append(f"NOT QUIET: others used {cores:.1f} cores just before {turn}.")
            before = CpuTimes.now()
            log = options.log_dir / f"{system.name}-{number}.log" if options.log_dir else None
            try:
                with serving(system, start_timeout_s=options.start_timeout_s, log=log) as (server, start_s):
                    if start_s is not None:
                        found.start_s.setdefault(system.name, []).append(start_s)
                    client.warm_up(server, found.loads[0], f"{options.seed}/{number}")
                    for load in found.loads:
                        _measure_load(found, system, server, load, client, f"{options.seed}/{number}/{load.name}", turn)
            except LoadError as error:
                _fail(found, turn, error)
            if (stolen := CpuTimes.now().stolen_share(before)) > QUIET_STOLEN:
                found.busy.append(f"NOT QUIET: the hypervisor took {stolen:.1%} of all cores during {turn}.")
            options.out.with_suffix(".json").write_text(found.to_json())


def _measure_load(
    found: Comparison, system: System, server: Server, load: Load, client: Client, seed: str, turn: str
) -> None:
    try:
        row = Figures.of(client.run(server, load, seed))
    except LoadError as error:
        _fail(found, f"{turn}, {load.name}", error)
        return
    found.add(load.name, system.name, row)
    tell(
        f"{turn}, {load.name}: {row.output_tokens_per_s:.1f} tok/s, TTFT {row.ttft_mean_ms:.0f} ms,"
        f" TPOT {row.tpot_median_ms:.1f} ms, ITL p99 {row.itl_p99_ms:.1f} ms"
    )


def _fail(found: Comparison, turn: str, error: LoadError) -> None:
    found.failures.append(f"FAILED: {turn}: {str(error).splitlines()[0]}")
    tell(f"FAILED: {turn}: {error}")


def tell(text: str) -> None:
    """Progress is not part of the table."""
    print(text, file=sys.stderr, flush=True)


def show(found: Comparison, out: Path) -> None:
    """The table to stdout, and the picture."""
    write_table(found)
    chart = out.with_suffix(".png")
    if write_chart(found, chart):
        tell(f"wrote {out.with_suffix('.json')} and {chart}")
    else:
        tell(f"wrote {out.with_suffix('.json')}; no picture: matplotlib is missing (pip install 'baton-serve[bench]')")


def parse_options(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line, with `systems` and `loads` made of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--baton", action="append", default=[], metavar="URL|[NAME=]OPTIONS")
    parser.add_argument("--peer", action="append", default=[], metavar="NAME=URL|COMMAND")
    parser.add_argument("--model", type=Path, help="checkpoint folder, for `baton up` and the client's tokenizer")
    parser.add_argument("--loads", nargs="+", choices=[load.name for load in STANDARD_LOADS])
    parser.add_argument("--rounds", type=int, help="default 3, with --quick 1")
    parser.add_argument("--quick", action="store_true", help="short loads that only show that everything works")
    parser.add_argument("--client", choices=["auto", "own", "vllm"], default="auto")
    parser.add_argument("--vllm", metavar="PATH", help="executable of vLLM, used as client")
    parser.add_argument("--seed", default="1", help="of prompts and arrivals")
    parser.add_argument("--out", type=Path, default=Path("compare"), help="results go to OUT.json and OUT.png")
    parser.add_argument("--log-dir", type=Path, help="keep the output of started commands there")
    parser.add_argument("--start-timeout-s", type=float, default=300.0)
    parser.add_argument("--redraw", type=Path, metavar="OUT.json", help="show earlier results again, measure nothing")
    options = parser.parse_args(arguments)
    try:
        batons = [parse_baton(text, model=options.model) for text in options.baton]
        options.systems = [*batons, *(parse_peer(text) for text in options.peer)]
    except ValueError as error:
        parser.error(str(error))
    names = [system.name for system in options.systems]
    if len(set(names)) < len(names):
        parser.error(f"names must differ: {', '.join(names)}")
    if not names and not options.redraw:
        parser.error("nothing to measure: give --baton or --peer")
    options.rounds = options.rounds or (1 if options.quick else 3)
    loads = QUICK_LOADS if options.quick else STANDARD_LOADS
    options.loads = [load for load in loads if options.loads is None or load.name in options.loads]
    options.vllm = None if options.client == "own" else find_vllm(options.vllm)
    if options.client == "vllm" and options.vllm is None:
        parser.error("--client vllm: no such executable; --vllm says where it is")
    if options.vllm and options.model is None and names:
        parser.error("the client vllm bench serve needs --model for its tokenizer; or say --client own")
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, or draws again; returns the exit status."""
    options = parse_options(arguments)
    if options.redraw:
        show(Comparison.from_json(options.redraw.read_text()), options.redraw)
        return 0
    client = Client(vllm=options.vllm, model=options.model)
    for folder in (options.out.parent, options.log_dir):
        if folder:
            folder.mkdir(parents=True, exist_ok=True)
    found = Comparison(
        client=client.name,
        machine=describe_machine(),
        loads=options.loads,
        systems={system.name: system.how for system in options.systems},
        batons=[system.name for system in options.systems if system.is_baton],
    )
    try:
        measure(found, options.systems, client, options)
    finally:
        if found.rounds:
            show(found, options.out)
    return 1 if found.failures else 0


if __name__ == "__main__":
    sys.exit(main())
