"""Moments of known Gaussians, by enumeration and from expected Gram matrices."""

import pytest
import torch

from grade_lightning.functional.moments import gram, moments, moments_from_norms, variance_components
from tests.functional.gaussians import (
    BETWEEN,
    MEAN,
    NORM,
    SAMPLING,
    WITHIN,
    assert_unbiased,
    equal,
    grams,
    grouped,
    normal,
)

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
