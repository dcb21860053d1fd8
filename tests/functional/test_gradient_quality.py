"""An estimator beside the true gradient: known Gaussians, and all cases of a small population."""

import math

import pytest
import torch
from scipy import optimize
from torch import Tensor

from grade_lightning.functional.gradient_quality import Alignment, alignment
from grade_lightning.functional.moments import gram
from tests.functional.gaussians import (
    MEAN,
    NORM,
    PROMPTS,
    SAMPLING,
    TRUTH,
    WITHIN,
    assert_unbiased,
    equal,
    grams,
    normal,
)


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
