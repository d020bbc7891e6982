"""The bench of the adaptive choice: its options, its ratios, its table."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from tests.router.harness import VOCAB_SIZE, running_router

import adaptive
from baton.cluster.loadgen.load_class import parse_classes
from baton.cluster.loadgen.slo import Slo


def _point(always: int, never: int, auto: int, mix: str = "mixed") -> dict[str, Any]:
    told = {"always": always, "never": never, "auto": auto}
    return {"mix": mix, "rate_per_s": 10.0} | {
        mode: {"good": good, "goodput_per_s": good / 10} for mode, good in told.items()
    }


def test_ratios_are_to_the_better_and_to_each() -> None:
    assert adaptive.ratios(_point(50, 80, 100)) == (1.25, 2.0, 1.25)
    assert adaptive.ratios(_point(0, 0, 0)) == (1.0, 1.0, 1.0)


def test_the_table_names_the_worst_and_the_best_point(capsys: pytest.CaptureFixture[str]) -> None:
    adaptive.show([_point(100, 80, 97, "long"), _point(50, 60, 90)], {"long": {"long": Slo(ttft_ms=100.0)}})
    told = capsys.readouterr().out
    assert "| long | 10.0/s | 10.0/s | 8.0/s | 9.7/s | 0.97 | 0.97 | 1.21 |" in told
    assert "worst point: 0.97 (long)" in told
    assert "best point: 1.50 (mixed)" in told
    assert "TTFT <= 100 ms" in told


def test_quick_is_a_part_of_the_whole() -> None:
    quick, whole = adaptive.parse_options(["--quick"]), adaptive.parse_options([])
    assert {mix.name for mix in quick.mixes} < {mix.name for mix in whole.mixes}
    assert len(quick.loads) < len(whole.loads)
    assert quick.seconds < whole.seconds
    assert quick.rounds < whole.rounds
    for mix in whole.mixes:
        assert parse_classes(mix.classes, Slo())


async def test_a_point_is_measured_against_a_router(tmp_path: Path) -> None:
    mix = adaptive.Mix("small", ("small:1:input=32,output=4",))
    async with running_router(tmp_path) as router:
        urls = dict.fromkeys(adaptive.MODES, router.http_url)
        client = await asyncio.to_thread(adaptive.Client, urls, VOCAB_SIZE)
        slos = await asyncio.to_thread(adaptive.objectives, client, mix)
        assert slos["small"].ttft_ms >= adaptive.TTFT_TIMES * adaptive.LATENCY_FLOOR_MS
        assert await asyncio.to_thread(adaptive.capacity, client, mix, 0.2) > 0
        generous = {"small": Slo(ttft_ms=1e6, tpot_ms=1e6)}
        options = adaptive.parse_options(["--seconds", "0.5", "--rounds", "2"])
        point = await asyncio.to_thread(adaptive.measure, client, mix, 40.0, generous, options)
        choices = await asyncio.to_thread(adaptive.metrics, router.http_url)
        assert any(line.startswith("baton_routing_choices_total") for line in choices)
    for mode in adaptive.MODES:
        assert point[mode]["requests"] == point["always"]["requests"] > 0
        assert point[mode]["good"] == point[mode]["requests"] == sum(point[mode]["good_by_round"])
        assert len(point[mode]["good_by_round"]) == 2
        assert point[mode]["goodput_per_s"] == point[mode]["good"] / 2 / 0.5
        assert point[mode]["failed"] == 0
