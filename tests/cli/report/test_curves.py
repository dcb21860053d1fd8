"""Where the points of a curve lie, and how far training and validation are apart."""

import dataclasses
import math
from importlib import import_module

import numpy as np
import pytest

from tests.cli.report.conftest import Make, arms, ending

bands = import_module("grade_lightning_cli.report.bands")
curves = import_module("grade_lightning_cli.report.curves")
runs = import_module("grade_lightning_cli.report.runs")
absent = import_module("grade_lightning_cli.report.absent").absent


def test_costs_are_those_logged(make: Make) -> None:
    (run, *_) = arms(make())[0].runs
    curve = run.curves["val/reward"]
    assert curves.position(run, curve, "train/sampled_tokens").tolist() == [0, 5000, 10000, 15000]
    assert curves.position(run, curve, "train/reward_calls").tolist() == [0, 800, 1600, 2400]
    assert curves.position(run, curve, "train/never") is None


def test_costs_between_and_beyond_the_logs(make: Make) -> None:
    grade, _ = found = arms(make())
    (run, *_) = grade.runs
    run.curves["val/reward"] = curve = runs.Curve(*([np.array([0.0, 6.0, 15.0, 22.0])] * 3))
    logged = np.array([4.0, 9.0, 14.0])
    run.curves["train/sampled_tokens"] = runs.Curve(logged, 100 * (logged + 1), logged)
    places = curves.position(run, curve, "train/sampled_tokens")
    assert places[:3].tolist() == [0.0, 700.0, 1500.0]  # the last carries the number of steps
    assert math.isnan(places[3])
    assert "GradeSTE: sampled tokens were not logged up to the last validation; it is not drawn against them." in (
        absent(found)
    )
    assert bands.reached(grade, 20.0, "train/sampled_tokens") == "not reached by 2 of 3 seeds"
    alone = dataclasses.replace(grade, runs=[run])
    assert bands.reached(alone, 20.0, "train/sampled_tokens") == "not known"
    assert bands.band(alone, "val/reward", "train/sampled_tokens").x.tolist() == [0.0, 700.0, 1500.0]
    run.about["spent"] = {"sampled_tokens": 2300}
    assert curves.position(run, curve, "train/sampled_tokens")[3] == 2300


def test_the_gap_is_of_the_steps_since_the_validation_before(make: Make) -> None:
    (run, *others), arm = (found := arms(make())[0]).runs, found
    steps, rewards = np.array([1.0, 3.0, 5.0, 7.0]), np.array([0.1, 0.2, 0.3, np.nan])
    run.curves["train/reward"] = runs.Curve(steps, rewards, steps)
    at = np.array([0.0, 3.0, 6.0, 9.0])
    run.curves["val/reward"] = runs.Curve(at, np.array([0.0, 0.05, 0.1, 0.2]), at)
    gap = curves.gap(run)
    assert gap.steps.tolist() == [
        3.0,
        6.0,
    ]  # nothing was trained before the first, nor is known of the last
    assert gap.values == pytest.approx([0.15 - 0.05, 0.3 - 0.1])
    for other in others:
        del other.curves["val/reward"]
    assert bands.gap_band(arm).mean == pytest.approx(gap.values)
    del run.curves["train/reward"]
    assert bands.gap_band(arm) is None


def test_what_was_spent_in_the_end_is_not_of_where_the_logs_end(make: Make) -> None:
    folder = make()
    study, _, _ = ending(folder, 7.0, 150)
    run = study.runs[3]
    logged = np.array([4.0, 9.0])
    run.curves["train/sampled_tokens"] = runs.Curve(logged, 100 * (logged + 1), logged)
    assert math.isnan(curves.position(run, run.curves["val/reward"], "train/sampled_tokens")[-1])
