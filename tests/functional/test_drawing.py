"""Drawn tokens: their frequencies, and those that must never be drawn."""

import pytest
import torch
from scipy.stats import chisquare

from grade_lightning.functional.drawing import draw


def test_frequencies_are_the_probabilities() -> None:
    """Chi-square of 200,000 draws; two rows at once, so that none answers for the other."""
    probs = torch.tensor([[0.5, 0.3, 0.15, 0.049, 0.001], [0.001, 0.2, 0.0, 0.3, 0.499]])
    size = 200_000
    tokens = draw(probs.log().repeat(size, 1)).view(size, 2)
    for row, expected in zip(tokens.T, probs.double(), strict=True):
        counts = torch.bincount(row, minlength=5).double()
        assert (counts[expected == 0] == 0).all()
        some = expected > 0
        wanted = expected[some] / expected[some].sum() * size
        assert chisquare(counts[some].numpy(), wanted.numpy()).pvalue > 1e-6


@pytest.mark.parametrize("place", [0, 2, 4])
def test_what_has_no_probability_is_never_drawn(place: int) -> None:
    """At the beginning, in the middle and at the end; also where only one token is left."""
    masked = torch.zeros(10_000, 5).index_fill(1, torch.tensor([place]), -torch.inf).log_softmax(-1)
    assert set(draw(masked).tolist()) == set(range(5)) - {place}
    alone = torch.full((1_000, 5), -torch.inf).index_fill(1, torch.tensor([place]), 0.0)
    assert set(draw(alone).tolist()) == {place}


def test_a_rare_token_behind_likely_ones_has_its_chance(monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum in float32 would end at 1 before it: the largest random number below 1 draws it."""
    monkeypatch.setattr(torch, "rand", lambda *size, **kwargs: torch.full(size, 1 - 1e-10, dtype=torch.float64))
    assert draw(torch.tensor([[1.0, 1e-9]]).log()).tolist() == [1]
