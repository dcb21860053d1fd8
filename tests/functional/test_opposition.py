"""Opposing gradients: planted groups are found, whatever stands beside them."""

import math

import pytest
import torch

from grade_lightning.functional.opposition import opposition


def test_planted_groups_cancel_and_are_found() -> None:
    """Three along u and three against it, with a little noise, and two that have nothing to do with them."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(500, generator=generator, dtype=torch.float64)
    signs = torch.tensor([1, -1, 1, 1, -1, -1, 0, 0], dtype=torch.float64).unsqueeze(1)
    noise = torch.randn(8, 500, generator=generator, dtype=torch.float64)
    gradients = signs * u + 0.05 * noise
    found = opposition(gradients @ gradients.T, extremes=3)
    assert found.ratio < 0.01
    assert found.share == pytest.approx(9 / 28)
    assert found.cosine < -0.99
    assert signs[list(found.pair)].sum() == 0
    assert {frozenset(side) for side in found.sides} == {frozenset({0, 2, 3}), frozenset({1, 4, 5})}
    assert found.weight > 0.99


def test_gradients_that_agree_add_up() -> None:
    found = opposition(torch.full((5, 5), 2.0))
    assert found.ratio == pytest.approx(5)
    assert found.share == 0
    assert found.cosine == pytest.approx(1)


def test_orthogonal_gradients_have_a_ratio_of_one() -> None:
    found = opposition(torch.diag(torch.tensor([1.0, 4.0, 0.0])))
    assert found.ratio == pytest.approx(1)
    assert found.cosine == 0  # a gradient of zero opposes nobody
    assert not math.isnan(found.weight)


def test_no_gradient_at_all() -> None:
    found = opposition(torch.zeros(2, 2))
    assert (found.ratio, found.share, found.cosine, found.weight) == (0, 0, 0, 0)
    assert sorted([*found.sides[0], *found.sides[1]]) == [0, 1]
