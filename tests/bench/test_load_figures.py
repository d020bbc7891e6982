"""The pure parts of the load client: loads, prompts, figures, and what the outside client's result becomes."""

from __future__ import annotations

import itertools
import statistics
from pathlib import Path

import pytest
import tokenizers

from load_client import LoadError, Server
from load_figures import Figures, Run, Stream, median, percentile
from quiet_machine import CpuTimes
from standard_loads import FIRST_TOKEN, STANDARD_LOADS, arrivals_s, seed_number, text_of_length, token_prompts
from vllm_client import read_result, vllm_command

TINY = Path(__file__).parents[2] / "src" / "baton" / "assets" / "tiny"
C1, C8, C32, MIX = STANDARD_LOADS


def test_standard_loads() -> None:
    assert [(load.name, load.requests, load.concurrency, load.rate_per_s) for load in STANDARD_LOADS] == [
        ("c1", 12, 1, None),
        ("c8", 32, 8, None),
        ("c32", 96, 32, None),
        ("mix", 30, None, 0.5),
    ]
    assert {(load.input_tokens, load.output_tokens) for load in (C1, C8, C32)} == {(256, 64)}
    assert (MIX.input_tokens, MIX.output_tokens) == (1024, 96)


def test_prompts_are_a_function_of_the_seed() -> None:
    prompts = token_prompts(C8, vocabulary=4000, seed="1/2/c8")
    assert prompts == token_prompts(C8, vocabulary=4000, seed="1/2/c8")
    assert prompts != token_prompts(C8, vocabulary=4000, seed="1/3/c8")
    assert [len(prompt) for prompt in prompts] == [256] * 32
    assert all(FIRST_TOKEN <= token < 4000 for prompt in prompts for token in prompt)
    assert seed_number("1/2/c8") == seed_number("1/2/c8") < 2**31


def test_arrivals_have_the_asked_rate() -> None:
    gaps: list[float] = []
    for seed in range(40):
        times_s = arrivals_s(MIX, seed=str(seed))
        assert times_s[0] == 0.0
        assert times_s == sorted(times_s)
        assert len(times_s) == 30
        gaps += [after - before for before, after in itertools.pairwise(times_s)]
    assert 1 / statistics.mean(gaps) == pytest.approx(0.5, rel=0.1)


def test_text_has_exactly_the_asked_number_of_tokens() -> None:
    tokenizer = tokenizers.Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for index, ids in enumerate(token_prompts(C8, vocabulary=tokenizer.get_vocab_size(), seed="x")[:4]):
        text = text_of_length(ids, tokenizer, vocabulary=tokenizer.get_vocab_size(), seed=str(index))
        assert len(tokenizer.encode(text, add_special_tokens=False).ids) == 256


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [([], 0.5, 0.0), ([7.0], 0.99, 7.0), ([3.0, 1.0], 0.5, 2.0), ([0.0, 10.0, 20.0, 30.0, 40.0], 0.99, 39.6)],
)
def test_percentile(values: list[float], share: float, expected: float) -> None:
    assert percentile(values, share) == pytest.approx(expected)


def test_figures_of_two_streams() -> None:
    run = Run([Stream(0.1, [0.01, 0.03], 0.14, 5, 3), Stream(0.3, [0.02, 0.2], 0.52, 5, 3)], wall_s=0.5)
    figures = Figures.of(run)
    assert figures.requests == 2
    assert figures.output_tokens_per_s == pytest.approx(12.0)
    assert figures.ttft_mean_ms == pytest.approx(200)
    assert figures.ttft_p50_ms == pytest.approx(200)
    assert figures.tpot_median_ms == pytest.approx((20 + 110) / 2)
    assert figures.itl_p50_ms == pytest.approx(25)
    assert figures.itl_max_ms == pytest.approx(200)
    assert figures.chunks_per_token == pytest.approx(1.0)


def test_median_is_of_each_figure() -> None:
    rows = [Figures.of(Run([Stream(first_s, [gap_s], first_s + gap_s, 5, 2)], wall_s=1.0)) for first_s, gap_s in
            ((0.1, 0.03), (0.3, 0.01), (0.2, 0.02))]  # fmt: skip
    row = median(rows)
    assert row.ttft_mean_ms == pytest.approx(200)
    assert row.tpot_median_ms == pytest.approx(20)
    assert row.requests == 1


def test_processor_times() -> None:
    before = CpuTimes.of("cpu  100 0 50 800 40 5 5 0 7 0\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    after = CpuTimes.of("cpu  150 0 60 830 40 5 5 10 7 0\n")
    assert after.busy_share(before) == pytest.approx(0.6)
    assert after.stolen_share(before) == pytest.approx(0.1)
    assert CpuTimes.of("") == CpuTimes(0, 0, 0)


def test_command_of_the_outside_client(tmp_path: Path) -> None:
    server = Server("http://127.0.0.1:1", "fake", takes_token_ids=True, counts_apart=True)
    command = vllm_command("vllm", server, C8, tokenizer=TINY, seed="s", result=tmp_path / "r.json")
    assert command[:3] == ["vllm", "bench", "serve"]
    assert command[command.index("--max-concurrency") + 1] == "8"
    assert command[command.index("--request-rate") + 1] == "inf"
    assert command[command.index("--seed") + 1] == str(seed_number("s"))
    assert "--ignore-eos" in command
    command = vllm_command("vllm", server, MIX, tokenizer=TINY, seed="s", result=tmp_path / "r.json")
    assert command[command.index("--request-rate") + 1] == "0.5"
    assert "--max-concurrency" not in command


def test_lengths_of_the_outside_client_count_only_where_the_server_told_them() -> None:
    result = {
        "completed": 12,
        "duration": 1.0,
        "output_lens": [64] * 11 + [70],
        "input_lens": [256] * 12,
        "ttfts": [0.1] * 12,
        "itls": [[0.01] * 63] * 12,
        "latencies": [0.73] * 12,
    }
    with pytest.raises(LoadError, match=r"lengths \[64, 70\] instead of 64"):
        read_result(result, C1, counts_apart=True)
    assert [stream.tokens for stream in read_result(result, C1, counts_apart=False).streams] == [64] * 12
    with pytest.raises(LoadError, match="11 of 12 requests"):
        read_result({**result, "completed": 11}, C1, counts_apart=False)
