"""Tempered ratios and the share of the reweighting, against the definitions."""

import math

import pytest
import torch

from grade_lightning.functional.arbitrary_entropy import entropy_share, reweighted, tempered_log_ratio


@pytest.mark.parametrize("temperature", [0.5, 0.8, 1.0, 1.2])
def test_tempered_ratios_against_the_distributions(temperature: float) -> None:
    """One of them with a token that is never sampled."""
    logits = 3 * torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    logits[3, 0] = -torch.inf
    tokens = torch.tensor([0, 1, 4, 2])
    found = tempered_log_ratio(logits.log_softmax(-1), tokens, temperature)
    both = (logits / temperature).softmax(-1), logits.softmax(-1)
    one, two = (x.gather(-1, tokens.unsqueeze(-1)).squeeze(-1) for x in both)
    torch.testing.assert_close(found, (one / two).log(), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(
    ("entropy", "correct", "truth"),
    [(0.45, 0.5, 0.1 / 1.1), (0.0, 0.25, 0.4 / 1.4), (2.0, 0.25, 0.4 / 1.4), (0.5, 0.5, 0.0), (0.0, 0.0, 0.0)],
)
def test_the_share(entropy: float, correct: float, truth: float) -> None:
    found = entropy_share(entropy, 0.5, torch.tensor(correct, dtype=torch.float64), 0.1)
    assert float(found) == pytest.approx(truth)


def test_reweighted_advantages() -> None:
    advantages = torch.tensor([[1.0, 2.0], [-1.0, 0.5]], dtype=torch.float64)
    log_ratio, right = torch.tensor([[math.log(2), 0.0]]).double().expand(2, 2), torch.tensor([True, False])
    found = reweighted(advantages, log_ratio, right, torch.tensor(0.25, dtype=torch.float64))
    torch.testing.assert_close(found, torch.tensor([[1.25, 1.75], [-0.75, 0.375]], dtype=torch.float64))
    assert torch.equal(reweighted(advantages, log_ratio, right, torch.tensor(0.0).double()), advantages)
