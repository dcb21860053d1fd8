"""How steady a method was, what it hacked, and how noisy its gradient was."""

import math
from importlib import import_module

import numpy as np
import pytest
from torch.utils.tensorboard import SummaryWriter

from tests.cli.report.conftest import Make, arms, place

diagnostics = import_module("grade_lightning_cli.report.diagnostics")


def test_hacking_is_flagged(make: Make) -> None:
    drift = next(diagnostics.drifts(arms(make())))
    assert drift.flagged
    assert drift.change == pytest.approx(-drift.reward)
    assert (drift.hacked, drift.seeds) == (3, 3)
    assert not drift._replace(change=0.1).flagged
    assert not drift._replace(reward=-0.1).flagged


def test_gap_is_over_seeds(make: Make) -> None:
    (grade, _) = arms(make())
    train, val = diagnostics.gaps(grade)
    expected = [run.curves["val/reward"].values[-1] - run.test["reward"] for run in grade.runs]
    assert val.mean == pytest.approx(sum(expected) / 3)
    assert val.covers == train.covers == "seeds"
    assert train.mean < val.mean  # the training reward is of the steps before


def test_how_steady_a_method_was(make: Make) -> None:
    arm = arms(make())[0]
    found = diagnostics.steadiness(arm)
    ends = [run.curves["val/reward"].values[-1] for run in arm.runs]
    assert found.between == pytest.approx(np.std(ends, ddof=1))
    assert found.within == pytest.approx(
        np.mean([np.std(run.curves["train/reward"].values[-6:], ddof=1) for run in arm.runs])  # of 30 logs
    )
    assert found.highest_kl == max(run.curves["train/kl"].values.max() for run in arm.runs)
    assert found.skipped == 6.0
    for run in arm.runs:
        run.curves.clear()
    assert all(math.isnan(x) for x in diagnostics.steadiness(arm))


def test_the_probe_goes_before_the_passive_figures(make: Make) -> None:
    folder = make()
    assert diagnostics.noise_kind(arms(folder)) == "grad"
    with SummaryWriter(str(place(folder) / "RLOO" / "version_0")) as writer:
        writer.add_scalar("probe/relative_std", 2.0, 50)
    assert diagnostics.noise_kind(arms(folder)) == "probe"
