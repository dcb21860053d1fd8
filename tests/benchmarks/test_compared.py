"""What a table of a comparison says: read from finished runs, made without any training."""

import math
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.cli.report.conftest import arms, write_study

compared, runs = import_module("benchmarks.compared"), import_module("grade_lightning_cli.report.runs")
row, samples_to, table = compared.row, compared.samples_to, compared.table


def _run(rewards: list[float]) -> Any:
    """Validated at the start and then every ten completions."""
    steps = np.arange(0.0, len(rewards))
    curves = {
        "val/reward": runs.Curve(steps, np.array(rewards), steps),
        "train/reward_calls": runs.Curve(steps, 10.0 * (1 + steps), steps),
    }
    return runs.Run(Path(), "RLOO", "default", 1, curves=curves)


@pytest.mark.parametrize(
    ("level", "rewards", "found"),
    [
        (0.5, [0.2, 0.4, 0.6, 0.4], 25.0),  # half-way between 20 and 30
        (0.4, [0.2, 0.4, 0.6], 20.0),
        (0.2, [0.3, 0.4], 0.0),  # before it began
        (0.5, [0.1, 0.7, 0.3, 0.9], 40 / 3),  # the first time counts
        (0.8, [0.2, 0.4], math.nan),
    ],
)
def test_samples_to_a_reward(level: float, rewards: list[float], found: float) -> None:
    assert samples_to(level, _run(rewards)) == pytest.approx(found, nan_ok=True)


def test_the_best_is_first_and_says_its_price(tmp_path: Path) -> None:
    folder = write_study(tmp_path, ("RLOO", "GradeSTE"), seeds=3)
    head, _, first, second = table(folder, 0.6).splitlines()
    assert "completions to 0.6" in head
    assert (first.split()[1], second.split()[1]) == ("GradeSTE", "RLOO")
    assert first.split(" | ")[4].replace(",", "").isdigit()
    assert second.split(" | ")[-1] == "3 |"


def test_seeds_that_never_get_there_are_counted(tmp_path: Path) -> None:
    (best, _) = arms(write_study(tmp_path, ("GradeSTE", "RLOO"), seeds=3))
    tops = sorted(run.curves["val/reward"].values[-1] for run in best.runs)
    assert row(best, float(tops[-1]) + 0.01)[4] == "not reached"
    assert row(best, float(tops[0] + tops[1]) / 2)[4].endswith("(2 of 3 seeds)")
