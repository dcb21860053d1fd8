"""Known Gaussians, enumeration and expected Gram matrices; intervals by their coverage and by brute force."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from scipy import optimize, stats
from torch import Tensor

from grade_lightning.functional.moments import (
    Alignment,
    Interval,
    Running,
    alignment,
    count_sketch,
    gram,
    jackknife,
    merge,
    moments,
    moments_from_norms,
    pseudo_values,
    ratio_interval,
    student_quantile,
    variance_components,
    welford,
)

MEAN = torch.tensor([0.9, -0.6, 0.3, 0.0, 0.5], dtype=torch.float64)
TRUTH = torch.tensor([1.0, -0.2, 0.1, 0.4, 0.8], dtype=torch.float64)
"""The true gradient, of which an estimator with the mean above is a biased one."""


def factor(seed: int, scale: float) -> Tensor:
    """A root of a covariance that is neither diagonal nor isotropic."""
    return scale * torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


SAMPLING, PROMPTS = factor(1, 0.5), factor(2, 0.4)
NORM, WITHIN, BETWEEN = (float(x.square().sum()) for x in (MEAN, SAMPLING, PROMPTS))


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def grams(draws: Tensor) -> Tensor:
    return draws @ draws.mT


def equal(found: Tensor, truth: Tensor | float, rtol: float = 1e-10, atol: float = 1e-10) -> None:
    expected = truth if isinstance(truth, Tensor) else found.new_tensor(truth)
    torch.testing.assert_close(found, expected, rtol=rtol, atol=atol)


def assert_unbiased(samples: Tensor, truth: float, least: float) -> None:
    """Within four standard errors, which are themselves at most a part `least` of the truth."""
    error = float(samples.std() / math.sqrt(len(samples)))
    assert error < least * abs(truth)
    assert abs(float(samples.mean()) - truth) < 4 * error


# ---- norm and trace -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [2, 3, 10])
def test_moments_of_a_known_gaussian(n: int) -> None:
    draws = MEAN + normal(20_000, n, seed=n) @ SAMPLING.T
    found = moments(grams(draws))
    assert_unbiased(found.squared_norm, NORM, 0.02)
    assert_unbiased(found.trace, WITHIN, 0.01)


@pytest.mark.parametrize("n", [2, 3, 10])
def test_moments_of_the_expected_gram_matrix_are_exact(n: int) -> None:
    """Both are linear in the Gram matrix, whose expectation is |G|² everywhere and tr Σ more on the diagonal."""
    found = moments(torch.full((n, n), NORM, dtype=torch.float64) + WITHIN * torch.eye(n, dtype=torch.float64))
    equal(found.squared_norm, NORM)
    equal(found.trace, WITHIN)


def test_moments_against_all_pairs_and_the_sample_covariance() -> None:
    draws = MEAN + normal(6, seed=0) @ SAMPLING.T
    pairs = [float(draws[i] @ draws[j]) for i in range(6) for j in range(6) if i != j]
    found = moments(gram(draws))
    equal(found.squared_norm, sum(pairs) / len(pairs))
    equal(found.trace, draws.T.cov().trace())


def test_norms_are_enough_and_layers_add_up() -> None:
    draws = MEAN + normal(7, 4, seed=0)
    whole = moments(grams(draws))
    norms = moments_from_norms(draws.square().sum(-1).mean(-1), draws.mean(1).square().sum(-1), 4)
    layers = [moments(grams(part)) for part in draws.split((2, 3), dim=-1)]
    for i in range(2):
        equal(norms[i], whole[i])
        equal(layers[0][i] + layers[1][i], whole[i])


def test_the_form_of_mccandlish() -> None:
    """Their equations A.2 and A.3, with batches of b and n b units; what they call S is of one unit."""
    n, b = 5, 3
    small, big = torch.tensor([9.0, 4.0], dtype=torch.float64), torch.tensor([3.0, 2.5], dtype=torch.float64)
    found = moments_from_norms(small, big, n)
    equal(found.squared_norm, (n * b * big - b * small) / (n * b - b))
    equal(b * found.trace, (small - big) / (1 / b - 1 / (n * b)))


@pytest.mark.parametrize("b", [1, 2, 4, 6])
def test_how_units_are_grouped_does_not_matter(b: int) -> None:
    units = MEAN + normal(10_000, 12, seed=3) @ SAMPLING.T
    found = moments(grams(units.view(10_000, 12 // b, b, 5).mean(2)))
    assert_unbiased(found.squared_norm, NORM, 0.02)
    assert_unbiased(b * found.trace, WITHIN, 0.02)


def test_a_weak_signal_may_come_out_negative() -> None:
    """Clamped at 0 it would be biased: without any signal the average of what is left is far above 0."""
    found = moments(grams(normal(10_000, 4, seed=0) @ SAMPLING.T)).squared_norm
    assert abs(float(found.mean())) < 4 * float(found.std()) / 100
    assert (found < 0).double().mean() > 0.4
    assert float(found.clamp(min=0).mean()) > 20 * float(found.std()) / 100


@pytest.mark.parametrize("groups", [0, 1])
def test_one_gradient_says_nothing_about_its_scatter(groups: int) -> None:
    with pytest.raises(ValueError, match="2 or more"):
        moments_from_norms(torch.tensor(3.0), torch.tensor(2.0), groups)
    with pytest.raises(ValueError, match="2 or more"):
        moments(torch.ones(3, groups, groups))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_inner_products_are_taken_in_float64(dtype: torch.dtype) -> None:
    """In float32, 2^24 + 1 is 2^24."""
    found = gram(torch.tensor([[4096.0, 1.0], [1.0, 0.0]], dtype=dtype))
    equal(found, torch.tensor([[2.0**24 + 1, 4096.0], [4096.0, 1.0]], dtype=torch.float64), rtol=0, atol=0)


# ---- prompts and sampling -------------------------------------------------------------------------------------------


def grouped(prompts: int, draws: int, seed: int, repetitions: int = 1) -> Tensor:
    """Gram matrices of gradients with the covariances above, of prompts and of sampling."""
    own = MEAN + normal(repetitions, prompts, 1, seed=seed) @ PROMPTS.T
    return grams((own + normal(repetitions, prompts, draws, seed=seed + 1) @ SAMPLING.T).flatten(1, 2))


def anova(draws: list[list[list[float]]]) -> tuple[float, float, float]:
    """The balanced one-way layout from its mean squares, one component of the gradient after the other."""
    p, k = len(draws), len(draws[0])
    norm = within = between = 0.0
    for c in range(len(draws[0][0])):
        means = [sum(draw[c] for draw in prompt) / k for prompt in draws]
        grand = sum(means) / p
        ms_within = sum((draw[c] - means[i]) ** 2 for i, prompt in enumerate(draws) for draw in prompt) / (p * (k - 1))
        ms_between = k * sum((mean - grand) ** 2 for mean in means) / (p - 1)
        norm += grand**2 - ms_between / (p * k)
        within += ms_within
        between += (ms_between - ms_within) / k
    return norm, within, between


@pytest.mark.parametrize(("p", "k"), [(2, 2), (2, 5), (5, 2), (4, 3)])
def test_components_against_a_plain_analysis_of_variance(p: int, k: int) -> None:
    draws = normal(p, 1, seed=p) + normal(p, k, seed=k + 10)
    found = variance_components(gram(draws.flatten(0, 1)), p)
    equal(torch.stack(found), torch.tensor(anova(draws.tolist()), dtype=torch.float64))


@pytest.mark.parametrize(("p", "k"), [(2, 2), (2, 5), (5, 2), (4, 3)])
def test_components_of_the_expected_gram_matrix_are_exact(p: int, k: int) -> None:
    """Linear as well: |G|² everywhere, the prompts' trace more within a prompt, sampling's on the diagonal."""
    same = torch.block_diag(*[torch.ones(k, k, dtype=torch.float64)] * p)
    found = variance_components(NORM + BETWEEN * same + WITHIN * torch.eye(p * k, dtype=torch.float64), p)
    equal(torch.stack(found), torch.tensor([NORM, WITHIN, BETWEEN], dtype=torch.float64))


def test_components_are_unbiased_where_independent_draws_would_not_be() -> None:
    """Draws of one prompt are correlated: treated as independent, |G|² is too large by B (K − 1) / (P K − 1)."""
    p, k = 4, 3
    products = grouped(p, k, seed=5, repetitions=2_500)
    found = [variance_components(one, p) for one in products]
    for name, truth in (("squared_norm", NORM), ("within", WITHIN), ("between", BETWEEN)):
        assert_unbiased(torch.stack([getattr(one, name) for one in found]), truth, 0.04)
    naive = moments(products).squared_norm
    excess = BETWEEN * (k - 1) / (p * k - 1)
    assert float(naive.mean()) - NORM > 6 * float(naive.std()) / 50
    assert_unbiased(naive, NORM + excess, 0.04)


def test_of_one_prompt_the_norm_is_its_own() -> None:
    products = grouped(1, 6, seed=0)[0]
    found, own = variance_components(products, 1), moments(products)
    equal(found.squared_norm, own.squared_norm)
    equal(found.within, own.trace)
    assert found.between.isnan()


def test_between_may_come_out_negative() -> None:
    """Two prompts with the same mean: less scatter between them than sampling alone would make."""
    found = variance_components(gram(torch.tensor([[1.0], [-1.0], [1.0], [-1.0]])), 2)
    equal(torch.stack(found), torch.tensor([0.0, 2.0, -1.0], dtype=torch.float64))


@pytest.mark.parametrize(("n", "prompts"), [(5, 2), (4, 4), (1, 1), (2, 4)])
def test_each_prompt_needs_the_same_number_of_draws(n: int, prompts: int) -> None:
    with pytest.raises(ValueError, match="each needs the same number"):
        variance_components(torch.eye(n), prompts)


# ---- beside the truth -----------------------------------------------------------------------------------------------


def test_alignment_of_known_gaussians_is_unbiased() -> None:
    """A biased, noisy estimator beside a noisy reference."""
    repetitions = 20_000
    draws = MEAN + normal(repetitions, 4, seed=0) @ SAMPLING.T
    reference = TRUTH + normal(repetitions, 3, seed=1) @ PROMPTS.T
    found = alignment(grams(draws), draws @ reference.mT, grams(reference))
    assert_unbiased(found.squared_norm, NORM, 0.02)
    assert_unbiased(found.trace, WITHIN, 0.01)
    assert_unbiased(found.product, float(MEAN @ TRUTH), 0.01)
    assert_unbiased(found.reference, float(TRUTH @ TRUTH), 0.02)
    lengths = normal(400_000, seed=2) @ SAMPLING.T + MEAN
    along = torch.nn.functional.normalize(lengths, dim=-1) @ TRUTH
    difference = float(found.projection.mean() - along.mean())
    assert abs(difference) < 4 * float((found.projection.var() / repetitions + along.var() / len(along)).sqrt())


def every(population: Tensor, n: int) -> Tensor:
    """All equally likely ways to draw n times from a population, (mⁿ, n, d): their average is the expectation."""
    rows = torch.cartesian_prod(*[torch.arange(len(population))] * n)
    return population[rows]


POPULATION = MEAN + normal(3, seed=8)
REFERENCES = TRUTH + normal(3, seed=9).sub(normal(3, seed=9).mean(0))


@pytest.fixture(scope="module")
def enumerated() -> Alignment:
    """Two draws beside two of the reference; every case is a setting."""
    draws, reference = every(POPULATION, 2), every(REFERENCES, 2)
    cross = torch.einsum("and,brd->abnr", draws, reference).flatten(0, 1)
    return alignment(grams(draws).repeat_interleave(9, 0), cross, grams(reference).repeat(9, 1, 1))


def closed_forms(population: Tensor, truth: Tensor) -> dict[str, float]:
    """What the properties are for a gradient that is one of the population, each as likely."""
    mean = population.mean(0)
    trace = float((population - mean).square().sum(-1).mean())
    norm, reference = float(mean.norm()), float(truth.norm())
    least = optimize.minimize_scalar(lambda c: float((c * population - truth).square().sum(-1).mean()))
    return {
        "cosine": float(mean @ truth) / (norm * reference),
        "squared_bias": float((mean - truth).square().sum()) / reference**2,
        "relative_std": math.sqrt(trace) / norm,
        "cosine_of_one": float((population @ truth / population.norm(dim=-1)).mean()) / reference,
        "scaled_error": float(least.fun) / reference**2,
    }


PROPERTIES = ["cosine", "squared_bias", "relative_std", "cosine_of_one", "scaled_error"]


def test_the_expectation_over_all_cases_is_exact(enumerated: Alignment) -> None:
    mean, truth = POPULATION.mean(0), REFERENCES.mean(0)
    equal(enumerated.squared_norm.mean(), mean @ mean)
    equal(enumerated.trace.mean(), (POPULATION - mean).square().sum(-1).mean())
    equal(enumerated.product.mean(), mean @ truth)
    equal(enumerated.reference.mean(), truth @ truth)
    equal(enumerated.projection.mean(), (POPULATION @ truth / POPULATION.norm(dim=-1)).mean())


@pytest.mark.parametrize("name", PROPERTIES)
def test_properties_are_ratios_of_averages(enumerated: Alignment, name: str) -> None:
    """Exact over all cases, though in some of these the signal is not resolved; the average of ratios is not."""
    equal(getattr(enumerated, name), closed_forms(POPULATION, REFERENCES.mean(0))[name], rtol=1e-7, atol=1e-7)
    alone = [Alignment(*(field[i] for field in enumerated)) for i in range(81)]
    ratios = torch.stack([getattr(one, name) for one in alone])
    assert abs(float(ratios.nanmean() - getattr(enumerated, name))) > 0.05
    assert ratios.isnan().any()


@pytest.mark.parametrize("name", PROPERTIES)
def test_a_true_gradient_that_is_known_is_given_twice(name: str) -> None:
    draws = every(POPULATION, 3)
    found = alignment(grams(draws), (draws @ TRUTH).unsqueeze(-1).expand(-1, -1, 2), (TRUTH @ TRUTH).expand(27, 2, 2))
    equal(found.reference, (TRUTH @ TRUTH).expand(27))
    equal(getattr(found, name), closed_forms(POPULATION, TRUTH)[name], rtol=1e-7, atol=1e-7)


def test_each_setting_is_on_its_own() -> None:
    draws, reference = MEAN + normal(3, 4, seed=0), TRUTH + normal(3, 2, seed=1)
    found = alignment(grams(draws), draws @ reference.mT, grams(reference))
    for i in range(3):
        alone = alignment(gram(draws[i]), draws[i] @ reference[i].T, gram(reference[i]))
        equal(torch.stack([field[i] for field in found]), torch.stack(alone))


def test_every_draw_counts_the_same() -> None:
    """In whatever order, those of the reference as well."""
    draws, reference = MEAN + normal(4, seed=0), TRUTH + normal(3, seed=1)
    found = alignment(gram(draws), draws @ reference.T, gram(reference))
    draws, reference = draws.roll(1, 0), reference.roll(1, 0).flip(0)
    equal(torch.stack(alignment(gram(draws), draws @ reference.T, gram(reference))), torch.stack(found))


@pytest.mark.parametrize(
    ("norm", "reference", "unresolved"),
    [
        (1.0, 1.0, []),
        (-0.1, 1.0, ["cosine", "relative_std"]),
        (0.0, 1.0, ["cosine", "relative_std"]),
        (1.0, -0.1, ["cosine", "squared_bias", "cosine_of_one", "scaled_error"]),
        (-0.1, -0.1, PROPERTIES),
    ],
)
def test_what_is_not_resolved_is_nan(norm: float, reference: float, unresolved: list[str]) -> None:
    values = (norm, 2.0, 0.5, reference, 0.3)
    found = Alignment(*(torch.tensor(x, dtype=torch.float64) for x in values))
    assert [name for name in PROPERTIES if getattr(found, name).isnan()] == unresolved


def test_a_gradient_of_zero_goes_nowhere() -> None:
    draws = torch.cat([POPULATION, torch.zeros(1, 5, dtype=torch.float64)])
    truth = TRUTH.expand(2, 5)
    found = alignment(gram(draws), draws @ truth.T, gram(truth))
    without = alignment(gram(POPULATION), POPULATION @ truth.T, gram(truth))
    equal(found.projection, without.projection * 3 / 4)
    nowhere = alignment(torch.zeros(2, 2), torch.zeros(2, 2), torch.ones(2, 2))
    assert nowhere.cosine_of_one == 0
    assert nowhere.cosine.isnan()


def test_a_gradient_of_nan_is_not_one_of_zero() -> None:
    draws = POPULATION.clone()
    draws[0] = torch.nan
    truth = TRUTH.expand(2, 5)
    assert alignment(gram(draws), draws @ truth.T, gram(truth)).cosine_of_one.isnan()


# ---- how sure -------------------------------------------------------------------------------------------------------


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


# ---- one after the other --------------------------------------------------------------------------------------------


def run(vectors: Tensor) -> Running:
    seen = None
    for vector in vectors:
        seen = welford(seen, vector)
    assert seen is not None
    return seen


def assert_running(found: Running, vectors: Tensor, rtol: float = 1e-12) -> None:
    assert found.number == len(vectors)
    equal(found.mean, vectors.mean(0), rtol=rtol)
    equal(found.deviations, vectors.var(0, correction=0) * len(vectors), rtol=rtol)


@pytest.mark.parametrize("left", range(1, 9))
def test_running_moments_of_any_split(left: int) -> None:
    vectors = MEAN + normal(9, seed=0)
    assert_running(run(vectors[:left]), vectors[:left])
    whole = merge(run(vectors[:left]), run(vectors[left:]))
    assert_running(whole, vectors)
    truth = moments(gram(vectors))
    equal(whole.trace, truth.trace)
    equal(whole.squared_norm, truth.squared_norm)


def test_merging_is_associative() -> None:
    vectors = normal(11, seed=0)
    a, b, c = (run(part) for part in vectors.split((1, 4, 6)))
    one, two = merge(merge(a, b), c), merge(a, merge(b, c))
    assert_running(one, vectors)
    assert_running(two, vectors)
    assert_running(merge(c, merge(b, a)), vectors)


def test_a_large_offset_does_not_drown_the_variance() -> None:
    """At 1e8 the square of a float64 is exact to 1 or 2 only; the variance is 1."""
    vectors = 1e8 + normal(1_000, seed=0)
    truth = (vectors - 1e8).var(0)
    naive = (vectors.square().sum(0) - vectors.sum(0).square() / 1_000) / 999
    assert ((naive - truth).abs() > 0.01).any()
    for found in (run(vectors), merge(run(vectors[:300]), run(vectors[300:]))):
        equal(found.deviations / 999, truth, rtol=1e-7, atol=0)


def test_one_vector_has_no_scatter_yet() -> None:
    found = welford(None, MEAN)
    assert found.number == 1
    equal(found.mean, MEAN)
    assert found.trace.isnan()
    assert found.squared_norm.isnan()


def test_a_gradient_may_be_overwritten_after_it_was_seen() -> None:
    gradient = MEAN.clone()
    found = welford(None, gradient)
    gradient.zero_()
    equal(found.mean, MEAN)


# ---- small ----------------------------------------------------------------------------------------------------------


def sketches(vector: Tensor, buckets: int, seeds: int, **options: Any) -> Tensor:
    return torch.stack([count_sketch(vector, buckets, seed, **options) for seed in range(seeds)])


def test_each_component_goes_to_one_bucket_with_a_sign() -> None:
    """So the sketch is a linear map, and every cell of bucket and sign is as likely as another."""
    eye = torch.eye(400, dtype=torch.float64)
    matrix = torch.stack([count_sketch(row, 4, seed=0) for row in eye])
    assert (matrix.count_nonzero(1) == 1).all()
    assert (matrix.abs().sum(1) == 1).all()
    cells = torch.cat([(matrix == sign).sum(0) for sign in (-1, 1)])
    assert stats.chisquare(cells.numpy()).pvalue > 0.01
    vector = torch.randn(400, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal(count_sketch(vector, 4, seed=0), vector @ matrix)


def test_a_sketch_is_determined_by_its_seed() -> None:
    """And neither uses nor disturbs the global generator."""
    vector = torch.randn(100, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(1)
    before = torch.get_rng_state()
    one = count_sketch(vector, 16, seed=3)
    torch.manual_seed(2)
    assert torch.equal(count_sketch(vector, 16, seed=3), one)
    assert not torch.allclose(count_sketch(vector, 16, seed=4), one)
    torch.manual_seed(1)
    count_sketch(vector, 16, seed=5)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("chunk", [2**20, 7])
def test_inner_products_of_sketches_are_unbiased(chunk: int) -> None:
    """Over seeds, with the variance (|x|² |y|² + ⟨x, y⟩² − 2 Σ x² y²) / k; with as many chunks as there may be."""
    x, y = torch.randn(2, 60, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = y + 0.5 * x
    k, seeds = 16, 2_000
    a, b = sketches(x, k, seeds, chunk=chunk), sketches(y, k, seeds, chunk=chunk)
    for one, two, u, v in ((a, b, x, y), (a, a, x, x)):
        found = (one * two).sum(1)
        variance = float(u @ u * (v @ v) + (u @ v) ** 2 - 2 * (u * u) @ (v * v)) / k
        assert abs(float(found.mean() - u @ v)) < 4 * math.sqrt(variance / seeds)
        assert float(found.var()) == pytest.approx(variance, rel=0.15)


@pytest.mark.parametrize("buckets", [8, 128])
def test_the_relative_deviation_is_about_the_root_of_two_over_the_buckets(buckets: int) -> None:
    vector = torch.randn(1_000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = sketches(vector, buckets, 1_000).square().sum(1) / vector.square().sum()
    assert float(found.std()) == pytest.approx(math.sqrt(2 / buckets), rel=0.1)


@pytest.mark.parametrize("chunk", [1, 7, 99, 100, 101])
def test_the_size_of_a_chunk_does_not_matter(chunk: int) -> None:
    """On the CPU, where random integers come one after the other."""
    vector = torch.randn(100, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    equal(count_sketch(vector, 16, seed=0, chunk=chunk), count_sketch(vector, 16, seed=0))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_sketch_of_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    vector = torch.randn(5_000, generator=torch.Generator().manual_seed(0)).to(dtype)
    found = count_sketch(vector, 4, seed=0)
    assert found.dtype == torch.float32
    equal(found, count_sketch(vector.float(), 4, seed=0), rtol=0, atol=0)
    equal(found.double(), count_sketch(vector.double(), 4, seed=0), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("function", [moments, lambda products: variance_components(products, 4)])
def test_sketches_enter_in_place_of_the_vectors(function: Callable[[Tensor], tuple[Tensor, ...]]) -> None:
    """With one seed for all draws, what is linear in inner products stays right on average over seeds."""
    draws = 0.2 * normal(4, 1, seed=0) + normal(4, 2, seed=1) + MEAN
    draws = draws.flatten(0, 1)
    found = [
        torch.stack(function(gram(torch.stack([count_sketch(draw, 8, seed) for draw in draws])))) for seed in range(250)
    ]
    off = torch.stack(found) - torch.stack(function(gram(draws)))
    assert (off.mean(0).abs() < 4 * off.std(0) / math.sqrt(250)).all()
