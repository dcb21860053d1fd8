"""Curves over seeds, and when they reached a reward."""

from importlib import import_module

import numpy as np
import pytest

from tests.cli.report.conftest import Make, arms

bands = import_module("grade_lightning_cli.report.bands")
runs = import_module("grade_lightning_cli.report.runs")


@pytest.mark.parametrize(
    ("start", "best", "levels"),
    [(0.5, 0.9, [0.6, 0.7, 0.8, 0.86]), (0.97, 0.999, [0.977, 0.985, 0.992, 0.996]),
     (1e6, 1e6 + 300, [1000075, 1000150, 1000225, 1000270]), (-216.4, -204.4, [-213, -210, -207, -206]),
     (0.5, 0.5, [])],
)  # fmt: skip
def test_levels_lie_on_the_way(make: Make, start: float, best: float, levels: list[float]) -> None:
    (arm, *_) = arms(make())
    for run in arm.runs:
        run.curves["val/reward"] = runs.Curve(*(np.array([a, b]) for a, b in ((0, 9), (start, best), (0, 1))))
    found = bands.levels([arm])
    assert found == pytest.approx(levels, rel=1e-3)
    assert all(start < level <= best for level in found)


def test_reached_is_never_extrapolated(make: Make) -> None:
    grade, rloo = arms(make())
    assert bands.reached(grade, 0.44, "steps") == "0"
    assert bands.reached(grade, 0.5, "steps") == "49"
    assert bands.reached(grade, 0.5, "train/sampled_tokens") == "5,000"
    assert bands.reached(rloo, 0.9, "steps") == "not reached"
    ends = sorted(run.curves["val/reward"].values[-1] for run in rloo.runs)
    assert bands.reached(rloo, ends[1], "steps") == "149 (2 of 3 seeds)"
    assert bands.reached(rloo, 0.5, "train/never") == "not known"
    assert bands.levels([grade, rloo]) == sorted(bands.levels([grade, rloo]))


def test_a_curve_is_drawn_by_means_of_neighbours() -> None:
    x = np.arange(100.0)
    band = bands.Band(x, 2 * x, x, 3 * x)
    few = bands.coarse(band, 4)
    assert few.x.tolist() == [12.0, 37.0, 62.0, 87.0]
    assert few.mean.tolist() == (2 * few.x).tolist()
    assert bands.coarse(band, 1000).high.tolist() == band.high.tolist()
