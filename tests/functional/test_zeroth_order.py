"""An estimate of the gradient from values: its moments, and what a clip does to it."""

import math

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.zeroth_order import clipped, direction, shrinkage, slope_sums

GRADIENT = torch.tensor([0.5, -1.0, 2.0, 0.0, 0.3, -0.7], dtype=torch.float64)


@pytest.fixture(scope="module")
def drawn() -> tuple[Tensor, Tensor]:
    """Slopes of a linear function along 200,000 directions."""
    directions = direction(torch.empty(200_000, 6, dtype=torch.float64), seed=0)
    weights = torch.ones(6, dtype=torch.float64)
    plus, minus = ((weights + by * directions) @ GRADIENT for by in (0.01, -0.01))
    sums = slope_sums(plus.unsqueeze(1), minus.unsqueeze(1), 0.01)
    return sums[:, 0] / sums[:, 1], directions


def within(values: Tensor, truth: Tensor | float, errors: float = 5.0) -> bool:
    """Whether the mean over draws lies within some standard errors of the truth."""
    error = values.std(0) / math.sqrt(len(values))
    return bool(((values.mean(0) - truth).abs() <= errors * error).all())


def test_it_is_unbiased_and_as_noisy_as_there_are_weights(drawn: tuple[Tensor, Tensor]) -> None:
    slopes, directions = drawn
    estimates = slopes.unsqueeze(1) * directions
    assert within(estimates, GRADIENT)
    assert within(estimates.square().sum(-1) / GRADIENT.square().sum(), 8.0)


@pytest.mark.parametrize("factor", [0.5, 1.0, 3.0])
def test_a_clip_shortens_and_turns_nothing(drawn: tuple[Tensor, Tensor], factor: float) -> None:
    slopes, directions = drawn
    norm = float(GRADIENT.norm())
    bound = factor * norm
    estimates = clipped(slopes, torch.tensor(bound, dtype=torch.float64)).unsqueeze(1) * directions
    assert within(estimates, shrinkage(bound, norm) * GRADIENT)


def test_at_the_gradients_own_norm_two_thirds_are_left() -> None:
    assert shrinkage(1.0, 1.0) == pytest.approx(0.683, abs=5e-4)


def test_rows_without_one_of_the_values_do_not_count() -> None:
    plus = torch.tensor([[1.0, torch.nan, 3.0], [torch.nan] * 3])
    minus = torch.tensor([[0.0, 1.0, torch.nan], [1.0] * 3])
    assert slope_sums(plus, minus, 0.5).tolist() == [[1.0, 1.0], [0.0, 0.0]]


def test_a_slope_that_is_not_finite_is_not_clipped_into_one() -> None:
    found = clipped(torch.tensor([torch.inf, torch.nan, 9.0]), torch.tensor(2.0))
    assert [str(x) for x in found.tolist()] == ["inf", "nan", "2.0"]
