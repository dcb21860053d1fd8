"""Intervals and tests against loops, scipy, and simulation."""

import doctest
import itertools
import math
from importlib import import_module

import numpy as np
import pytest
from scipy import stats

statistics = import_module("grade_lightning_cli.report.statistics")  # its name once it is installed


@pytest.mark.parametrize("name", ["statistics", "wording"])
def test_examples(name: str) -> None:
    found = doctest.testmod(import_module(f"grade_lightning_cli.report.{name}"))
    assert found.attempted > 0
    assert found.failed == 0


def naive(x: list[list[float]]) -> float:
    """Half the width, by the textbook's sums."""
    seeds, prompts = len(x), len(x[0])
    mean = sum(map(sum, x)) / (seeds * prompts)
    rows = [sum(row) / prompts for row in x]
    columns = [sum(row[j] for row in x) / seeds for j in range(prompts)]
    ms_seeds = prompts * sum((r - mean) ** 2 for r in rows) / (seeds - 1)
    ms_prompts = seeds * sum((c - mean) ** 2 for c in columns) / (prompts - 1)
    rest = sum((x[i][j] - rows[i] - columns[j] + mean) ** 2 for i in range(seeds) for j in range(prompts))
    ms_rest = rest / ((seeds - 1) * (prompts - 1))
    t_seeds, t_prompts = stats.t.ppf(0.975, seeds - 1), stats.t.ppf(0.975, prompts - 1)
    total = t_seeds**2 * ms_seeds + t_prompts**2 * max(ms_prompts - ms_rest, 0.0)
    return math.sqrt(float(total) / (seeds * prompts))


@pytest.mark.parametrize("easy", [0.0, 1.0])
def test_interval_against_loops(easy: float) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(4, 9)) + easy * rng.normal(size=9)
    found = statistics.crossed_interval(x)
    assert found[:2] == (pytest.approx(x.mean()), pytest.approx(naive(x.tolist())))
    assert (found.covers, found.seeds, found.prompts, found.left_out) == ("seeds and prompts", 4, 9, 0)


def test_interval_of_one_row_or_one_column() -> None:
    x = np.array([0.1, 0.5, 0.4, 0.9])
    low, high = stats.t.interval(0.95, 3, x.mean(), stats.sem(x))
    for values, covers in ((x[None], "prompts"), (x[:, None], "seeds")):
        found = statistics.crossed_interval(values)
        assert (found.mean - found.half_width, found.mean + found.half_width) == pytest.approx((low, high))
        assert found.covers == covers


def test_interval_of_too_little() -> None:
    assert math.isnan(statistics.crossed_interval(np.array([[0.5]])).half_width)
    nothing = statistics.crossed_interval(np.array([[math.nan, math.inf]]))
    assert math.isnan(nothing.mean)
    assert (nothing.seeds, nothing.left_out) == (0, 2)
    assert statistics.crossed_interval(np.empty((0, 1))).seeds == 0


def test_missing_values_weigh_nothing() -> None:
    x = np.array([[0.0, 1.0, math.nan], [1.0, 2.0, 3.0], [math.nan] * 3])
    found = statistics.crossed_interval(x)
    assert found.mean == pytest.approx((0.5 + 2.0) / 2)
    assert (found.seeds, found.left_out) == (2, 4)
    # one seed: the error of a mean over what is there, whatever is not there
    lone = np.array([[0.0, 1.0, 3.0, math.nan, math.nan]])
    n, sd = 3, lone[0, :3].std(ddof=0)
    expected = stats.t.ppf(0.975, 4) * sd / math.sqrt(n) * math.sqrt(5 / 4)
    assert statistics.crossed_interval(lone).half_width == pytest.approx(expected)


@pytest.mark.parametrize("missing", [0.0, 0.2])
@pytest.mark.parametrize(("seed_sd", "easy_sd", "rest_sd"), [(0.0, 0.3, 0.3), (0.05, 0.1, 0.4), (0.2, 0.3, 0.3)])
def test_interval_covers(seed_sd: float, easy_sd: float, rest_sd: float, missing: float) -> None:
    rng = np.random.default_rng(1)
    hits, runs, shape = 0, 400, (3, 60)
    for _ in range(runs):
        x = rng.normal(0, seed_sd, (3, 1)) + rng.normal(0, easy_sd, 60) + rng.normal(0, rest_sd, shape)
        x[rng.random(shape) < missing] = math.nan
        found = statistics.crossed_interval(x)
        hits += abs(found.mean) <= found.half_width
    assert hits / runs >= 0.93  # 95 % less two standard errors


def test_test_against_scipy_and_all_flips() -> None:
    one, two = np.random.default_rng(0).normal([[0.3], [0.0]], 0.3, (2, 6))
    found = statistics.paired_test(one - two)
    assert found.p == pytest.approx(stats.ttest_rel(one, two).pvalue)
    means = [np.mean(np.array(signs) * (one - two)) for signs in itertools.product((1, -1), repeat=6)]
    assert found.p_flip == pytest.approx(np.mean(np.abs(means) >= abs(np.mean(one - two)) - 1e-12))
    assert found.effect == pytest.approx((one - two).mean() / (one - two).std(ddof=1))


@pytest.mark.parametrize("differences", [[], [0.3], [0.3, 0.2], [0.3, 0.3, 0.3]])
def test_no_test_without_seeds_or_scatter(differences: list[float]) -> None:
    assert statistics.paired_test(np.array(differences)) is None


def test_holm_against_its_definition() -> None:
    p = np.random.default_rng(0).uniform(0, 0.1, 7)
    corrected = statistics.holm(p)
    for level in np.linspace(0.001, 0.5, 60):
        rejected = set()
        for k, i in enumerate(np.argsort(p)):  # step down until one stands
            if p[i] > level / (len(p) - k):
                break
            rejected.add(int(i))
        assert {i for i, x in enumerate(corrected) if x <= level} == rejected
