"""Some rows for all of them: right on average whatever the probabilities, exact with all, and of less variance."""

import itertools
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.row_sampling import rest, shares, winner_take_all, winners


@pytest.mark.parametrize("weights", [[1.0, 1.0, 1.0, 1.0], [8.0, 1.0, 0.5, 0.5], [3.0, 2.0, 1.0, 0.1]])
def test_over_all_draws_the_mean_is_the_sum(weights: list[float]) -> None:
    """Of four rows two: the terms of the rows have nothing to do with their probabilities."""
    probabilities = shares(torch.tensor(weights, dtype=torch.float64))
    terms = torch.tensor([[1.0, -2.0], [0.3, 5.0], [-4.0, 0.7], [2.0, 2.0]], dtype=torch.float64)
    _, others, _ = rest(probabilities, 2)
    mean, mass = torch.zeros(2, dtype=torch.float64), 0.0
    for drawn in itertools.product(range(4), repeat=2):
        chance = float(others[list(drawn)].prod())
        if chance:
            with patch.object(Tensor, "multinomial", lambda *_, drawn=drawn, **__: torch.tensor(drawn)):
                places, scales = winner_take_all(probabilities, 2)
            mean += chance * (terms[places] * scales.unsqueeze(1)).sum(0)
            mass += chance
    assert mass == pytest.approx(1)
    torch.testing.assert_close(mean, terms.sum(0), rtol=0, atol=1e-12)


def test_the_number_of_winners_is_the_best_of_all() -> None:
    """By the definition, and at the ends: none where all are alike."""
    for seed in range(20):
        probabilities = shares(torch.rand(12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 6)
        sums = [0.0, *probabilities.sort(descending=True).values.cumsum(0).tolist()]
        scores = [(1 - sums[c]) / (5 - c) for c in range(5)]
        assert int(winners(probabilities, 5)) == scores.index(min(scores))
    assert int(winners(torch.full((12,), 1 / 12), 5)) == 0


def test_with_all_rows_it_is_exact() -> None:
    places, scales = winner_take_all(shares(torch.rand(6)), 6)
    assert places.tolist() == list(range(6))
    assert scales.tolist() == [1] * 6


def test_winners_take_most_of_the_variance() -> None:
    """Terms in proportion to their probabilities but for a sign; five of twelve, against plain sampling."""
    sizes = torch.tensor([9.0, 7.0, 6.0, *[0.5] * 9], dtype=torch.float64)
    signs = torch.tensor([1.0, -1.0] * 6, dtype=torch.float64)
    probabilities, terms = shares(sizes), sizes * signs
    assert int(winners(probabilities, 5)) == 3
    _, others, count = rest(probabilities, 5)

    def variance(chances: Tensor, draws: int) -> float:
        chosen = chances > 0
        return float(((terms[chosen] ** 2 / chances[chosen]).sum() - terms[chosen].sum() ** 2) / draws)

    torch.manual_seed(0)
    found = []
    for _ in range(2000):
        places, scales = winner_take_all(probabilities, 5)
        found.append((terms[places] * scales).sum())
    values = torch.stack(found)
    expected = variance(others, 5 - int(count))
    assert float(values.mean()) == pytest.approx(float(terms.sum()), abs=5 * (expected / 2000) ** 0.5)
    assert float(values.var()) == pytest.approx(expected, rel=0.2)
    assert expected < variance(probabilities, 5) / 5


def test_no_row_is_out_of_reach() -> None:
    """Where the input is nothing the gradient may still be something, if the sizes are of something else."""
    found = shares(torch.tensor([0.0, 1.0, 1.0]))
    assert (found > 0).all()
    assert float(found.sum()) == pytest.approx(1)
    assert shares(torch.zeros(2)).tolist() == [0.5, 0.5]
