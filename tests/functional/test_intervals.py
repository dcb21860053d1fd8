"""Intervals by their coverage and by brute force."""

import math

import pytest
import torch
from scipy import stats
from torch import Tensor

from grade_lightning.functional.intervals import Interval, jackknife, pseudo_values, ratio_interval, student_quantile
from grade_lightning.functional.moments import gram, moments, moments_from_norms, variance_components
from tests.functional.gaussians import BETWEEN, MEAN, NORM, SAMPLING, WITHIN, equal, grouped, normal


@pytest.mark.parametrize(
    ("level", "rtol"), [(0.5, 2e-4), (0.8, 3e-4), (0.9, 5e-4), (0.95, 1.3e-3), (0.99, 8e-3)], ids=str
)
def test_quantiles_of_student_s_t(level: float, rtol: float) -> None:
    """Worst at 3 degrees of freedom; from 6 on, better than a twentieth of that."""
    for freedom in range(1, 101):
        truth = float(stats.t.ppf((1 + level) / 2, freedom))
        tolerance = 1e-12 if freedom <= 2 else rtol if freedom <= 5 else rtol / 20
        assert student_quantile(level, freedom) == pytest.approx(truth, rel=tolerance)


@pytest.mark.parametrize(("n", "rel"), [(2, 1e-9), (3, 1e-9), (4, 1.3e-3), (30, 1e-6)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_jackknife_of_a_mean_is_the_t_interval(n: int, rel: float, level: float) -> None:
    data = normal(n, seed=n)[:, 0]
    found = jackknife(lambda rows: data[rows].mean(), n, level)
    equal(found.estimate, data.mean())
    low, high = stats.t.interval(level, n - 1, float(data.mean()), stats.sem(data.numpy()))
    assert float(found.high - found.low) == pytest.approx(high - low, rel=rel)
    equal((found.low + found.high) / 2, data.mean())


def test_the_pseudo_values_of_a_mean_are_the_data() -> None:
    data = normal(7, seed=0)
    equal(pseudo_values(lambda rows: data[rows].mean(0), 7), data)


def test_pseudo_values_leave_out_one_unit_at_a_time() -> None:
    data = normal(4, seed=0)[:, 0].exp()
    rest = [torch.stack([data[j] for j in range(4) if j != i]) for i in range(4)]
    truth = [4 * data.std() - 3 * part.std() for part in rest]
    equal(pseudo_values(lambda rows: data[rows].std(), 4), torch.stack(truth))


def test_the_jackknife_removes_the_bias_of_a_squared_mean() -> None:
    """|ḡ|² is tr Σ / n too large; its pseudo-values average to the unbiased norm, in every sample."""
    draws = MEAN + normal(6, seed=0) @ SAMPLING.T
    values = pseudo_values(lambda rows: draws[rows].mean(0).square().sum(), 6)
    equal(values.mean(), moments(gram(draws)).squared_norm)
    assert float(values.mean() - draws.mean(0).square().sum()) < -0.1


def test_the_jackknife_of_several_numbers_at_once() -> None:
    data = normal(6, seed=0)
    found = jackknife(lambda rows: data[rows].mean(0).exp(), 6)
    equal(found.estimate, data.mean(0).exp())
    for i in range(5):
        alone = jackknife(lambda rows, i=i: data[rows, i].mean().exp(), 6)
        equal(torch.stack([x[i] for x in found]), torch.stack(alone))


@pytest.mark.parametrize("units", [0, 1])
def test_one_unit_has_no_interval(units: int) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        pseudo_values(lambda rows: rows.double().mean(), units)
    with pytest.raises(ValueError, match="2 or more"):
        jackknife(lambda rows: rows.double().mean(), units)


def assert_covers(intervals: list[Interval], truth: float, bounded: float) -> None:
    """About as often as it says, and not by being infinite."""
    covered = sum(bool(one.low <= truth <= one.high) for one in intervals) / len(intervals)
    assert 0.90 < covered < 0.995
    assert sum(bool(one.high.isfinite()) for one in intervals) >= bounded * len(intervals)
    for one in intervals:
        assert one.estimate.isnan() or one.low <= one.estimate <= one.high


@pytest.mark.parametrize(("steps", "groups", "bounded"), [(30, 4, 0.99), (10, 4, 0.75)])
def test_coverage_over_steps(steps: int, groups: int, bounded: float) -> None:
    """The noise scale tr Σ / |G|², from a few groups in each of several steps."""
    draws = MEAN + normal(500, steps, groups, seed=1) @ SAMPLING.T
    intervals = []
    for run in draws:
        found = moments_from_norms(run.square().sum(-1).mean(-1), run.mean(1).square().sum(-1), groups)
        intervals.append(ratio_interval(found.trace, found.squared_norm))
    assert_covers(intervals, WITHIN / NORM, bounded)


@pytest.mark.slow
def test_coverage_over_prompts() -> None:
    """The same with the variance of prompts, from the pseudo-values of an analysis of variance."""
    prompts, draws = 24, 2

    def components(products: Tensor, rows: Tensor) -> Tensor:
        index = (rows.unsqueeze(1) * draws + torch.arange(draws)).flatten()
        found = variance_components(products[index][:, index], len(rows))
        return torch.stack([found.within + found.between, found.squared_norm])

    intervals = []
    for products in grouped(prompts, draws, seed=7, repetitions=300):
        values = pseudo_values(lambda rows, products=products: components(products, rows), prompts)
        intervals.append(ratio_interval(values[:, 0], values[:, 1]))
    assert_covers(intervals, (WITHIN + BETWEEN) / NORM, 0.85)


def pairs(n: int, seed: int, level: float = 0.0, spread: float = 1.0) -> tuple[Tensor, Tensor]:
    """Correlated observations of a numerator and a denominator."""
    noise = normal(n, seed=seed)
    return 1.0 + spread * noise[:, 0], level + spread * (0.6 * noise[:, 0] + 0.8 * noise[:, 1])


GRID = torch.cat([torch.zeros(1, dtype=torch.float64), torch.logspace(-4, 6, 4001, dtype=torch.float64)])
TWO_PIECES = torch.tensor([3.0, -3.0, 2.0, -2.0], dtype=torch.float64)


def test_the_interval_is_the_set_of_ratios_that_are_not_rejected() -> None:
    """By Student's t of above − θ below, on a grid of θ; where two pieces remain, all from the least to infinity."""
    cases = [
        (*pairs(n, seed, level, spread), confidence)
        for seed in range(8)
        for n in (2, 3, 4, 6, 12)
        for level in (-0.3, 0.5, 2.0)
        for spread in (0.2, 1.0)
        for confidence in (0.8, 0.95)
    ]
    cases.append((TWO_PIECES + torch.tensor([1.0, 1.01, 0.99, 1.0]), TWO_PIECES + 0.6, 0.95))
    seen = {"bounded": 0, "one ray": 0, "two pieces": 0, "everything": 0, "not positive": 0}
    for above, below, confidence in cases:
        n = len(above)
        rest = above - GRID.unsqueeze(1) * below
        kept = rest.mean(1).abs() <= student_quantile(confidence, n - 1) * rest.std(1) / math.sqrt(n)
        found = ratio_interval(above, below, confidence)
        ends = torch.stack([found.low, found.high])
        sure = ((GRID.unsqueeze(1) - ends).abs() > 1e-6 * GRID.unsqueeze(1)).all(1)  # the ends may fall either way
        kept, inside, grid = kept[sure], GRID.clamp(found.low, found.high).eq(GRID)[sure], GRID[sure]
        assert not (kept & ~inside).any()
        if not below.mean() > 0:
            seen["not positive"] += 1
            assert found.estimate.isnan()
            assert (float(found.low), float(found.high)) == (0.0, math.inf)
            continue
        equal(found.estimate, above.mean() / below.mean())
        if not kept.any():  # all of the set lies below 0
            assert above.mean() < 0
            continue
        significant = below.mean() > student_quantile(confidence, n - 1) * below.std() / math.sqrt(n)
        assert found.high.isfinite() == significant
        assert torch.equal(grid[kept][0], grid[inside][0])
        if significant:
            seen["bounded"] += 1
            assert torch.equal(kept, inside)
        elif torch.equal(kept, inside):
            seen["one ray" if found.low > 0 else "everything"] += 1
        else:
            seen["two pieces"] += 1
            assert kept[0]
            assert kept[-1]
    assert min(seen.values()) > 0
    assert seen["bounded"] > 100


@pytest.mark.parametrize("n", [2, 5, 20])
def test_a_constant_denominator_leaves_the_t_interval(n: int) -> None:
    above = 3 + normal(n, seed=n)[:, 0]
    found = ratio_interval(above, torch.full((n,), 2.0, dtype=torch.float64), 0.9)
    low, high = stats.t.interval(0.9, n - 1, float(above.mean()), stats.sem(above.numpy()))
    equal(torch.stack(found), torch.tensor([above.mean() / 2, max(low, 0) / 2, high / 2]), rtol=2e-4)


@pytest.mark.parametrize(
    ("below", "estimate"), [([1.0, -1.0, 2.0], 3.0), ([-1.0, -3.0, 1.0], math.nan), ([-1.0, 0.0, 1.0], math.nan)]
)
def test_a_denominator_that_may_be_zero_has_no_upper_end(below: list[float], estimate: float) -> None:
    found = ratio_interval(torch.tensor([2.0, 1.0, 3.0]), torch.tensor(below))
    assert float(found.estimate) == pytest.approx(estimate, nan_ok=True)
    assert found.high == math.inf
    assert found.low >= 0


@pytest.mark.parametrize(("below", "estimate"), [(2.0, 1.5), (-2.0, math.nan), (0.0, math.nan)])
def test_the_ratio_of_one_unit_has_no_ends(below: float, estimate: float) -> None:
    found = ratio_interval(torch.tensor([3.0]), torch.tensor([below]))
    assert [float(x) for x in found] == pytest.approx([estimate, math.nan, math.nan], nan_ok=True)


@pytest.mark.parametrize("level", [-0.3, 0.5, 2.0])
@pytest.mark.parametrize("c", [1e-12, 1e-3, 7.0, 1e9])
def test_units_of_measurement_do_not_matter(level: float, c: float) -> None:
    """Bounded, without an upper end, and not resolved."""
    above, below = pairs(6, 3, level)
    whole = torch.stack(ratio_interval(above, below))
    for found, scale in ((ratio_interval(c * above, below), c), (ratio_interval(above, c * below), 1 / c)):
        torch.testing.assert_close(torch.stack(found), scale * whole, rtol=1e-9, atol=0, equal_nan=True)


def test_of_a_negative_ratio_only_zero_is_left() -> None:
    """No θ ≥ 0 is compatible with the data; the interval is empty or a point, but not upside down."""
    found = ratio_interval(torch.tensor([-3.0, -3.1, -2.9, -3.0]), torch.tensor([1.0, 1.1, 1.0, 0.9]))
    assert 0 <= found.low <= found.high
