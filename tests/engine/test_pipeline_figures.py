"""The bubble of a stage is what is left of the driver's busy time."""

from __future__ import annotations

from baton.engine.pipeline_figures import PipelineFigures


def test_a_stage_is_in_its_bubble_when_steps_are_under_way_and_it_computes_none() -> None:
    driver = PipelineFigures(steps=10, step_s=9.0, bubble_s=2.0, busy_s=10.0)
    stage = PipelineFigures(steps=10, step_s=7.0, bubble_s=1.0)
    assert driver.work_s == 7.0
    assert stage.work_s == 6.0
    assert stage.bubble_s_of(driver.busy_s) == 4.0
    assert stage.bubble_share_of(driver.busy_s) == 0.4
    assert driver.bubble_share == 2.0 / 9.0


def test_shares_stay_within_bounds_when_readings_are_of_different_moments() -> None:
    assert PipelineFigures().bubble_share == 0.0
    assert PipelineFigures().bubble_share_of(0.0) == 0.0
    assert PipelineFigures(step_s=3.0).bubble_share_of(2.0) == 0.0
    assert PipelineFigures().bubble_share_of(2.0) == 1.0


def test_sums_since_a_reading() -> None:
    figures = PipelineFigures(steps=3, step_s=1.5, bubble_s=0.5, busy_s=2.0)
    before = figures.copy()
    figures.steps += 1
    figures.step_s += 1.0
    figures.busy_s += 3.0
    assert before.steps == 3
    assert figures.since(before) == PipelineFigures(steps=1, step_s=1.0, bubble_s=0.0, busy_s=3.0)
