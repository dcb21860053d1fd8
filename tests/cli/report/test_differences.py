"""Pairs of methods: when they are tested, and when not."""

import math
from importlib import import_module

import pytest
from scipy import stats

from tests.cli.report.conftest import Make, arms, place, row, verdict, write_test

differences = import_module("grade_lightning_cli.report.differences")
estimates = import_module("grade_lightning_cli.report.estimates")


def test_pairs_are_tested_over_seeds(make: Make) -> None:
    found = arms(make(("GradeSTE", "RLOO", "PPO")))
    pairs = differences.differences(found, "reward")
    assert [(d.first.label, d.second.label) for d in pairs] == [
        ("GradeSTE", "PPO"), ("GradeSTE", "RLOO"), ("PPO", "RLOO")
    ]  # fmt: skip
    one, two = ([run.test["reward"] for run in arm.runs] for arm in (pairs[0].first, pairs[0].second))
    assert pairs[0].test.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    assert pairs[0].test.p_flip == 0.25
    assert [d.p for d in pairs] == pytest.approx(sorted(d.p for d in pairs))
    assert pairs[0].p == pytest.approx(3 * pairs[0].test.p)
    # the judge is one minus the reward
    (other, *_) = differences.differences(found, "rewards/truth")
    assert other.estimate.mean == pytest.approx(-pairs[0].estimate.mean)
    # KL is 5 nats for all
    (objective, *_) = differences.differences(found, "objective", beta=0.01)
    assert objective.estimate.mean == pytest.approx(pairs[0].estimate.mean)
    assert estimates.measure(found[0], "objective", 0.01).mean == pytest.approx(
        estimates.measure(found[0], "reward").mean - 0.05
    )


@pytest.mark.parametrize(("seeds", "why"), [(1, "one seed: no test is possible"), (2, "two seeds: no test is made")])
def test_few_seeds_have_no_test(make: Make, seeds: int, why: str) -> None:
    folder = make(seeds=seeds)
    (difference,) = differences.differences(arms(folder), "reward")
    assert difference.test is None
    assert math.isnan(difference.p)
    assert not difference.significant
    assert difference.estimate.covers == ("prompts" if seeds == 1 else "seeds and prompts")
    assert verdict(folder).endswith(f"Whether that is more than chance cannot be said ({why}).")


def test_other_prompts_are_not_paired(make: Make) -> None:
    folder = make()
    for seed in (1, 2, 3):
        write_test(place(folder, seed=seed), [row(f"other {i}", 0.1 * i) for i in range(5)])
    found = arms(folder)
    (difference,) = differences.differences(found, "reward")
    assert (difference.estimate, difference.test) == (None, None)
    assert "the prompts differ" in verdict(folder)
    assert estimates.measure(found[1], "reward").covers == "seeds and prompts"


def test_an_interval_that_reaches_zero_is_not_significant(make: Make) -> None:
    (difference,) = differences.differences(arms(make()), "reward")
    assert difference.significant
    assert not difference._replace(estimate=difference.estimate._replace(half_width=1.0)).significant
    assert not difference._replace(p=0.06).significant
