"""When a conversation branches."""

import pytest
import torch

from grade_lightning.functional.branching import branches, first_surprise


@pytest.mark.parametrize(
    ("uniform", "rise", "probability", "weight", "penalty", "truth"),
    [
        (0.5, 0.0, 0.5, 0.2, 0.0, True),
        (0.51, 0.0, 0.5, 0.2, 0.0, False),
        (0.69, 1.0, 0.5, 0.2, 0.0, True),  # less certain than at first
        (0.71, 1.0, 0.5, 0.2, 0.0, False),
        (0.4, -1.0, 0.5, 0.2, 0.0, False),  # more certain
        (0.99, 50.0, 0.01, 0.2, 0.0, True),  # held at 0
        (0.0, 50.0, 0.0, 0.2, 0.0, False),
        (0.31, 0.0, 0.5, 0.2, 0.4, False),
        (0.29, 0.0, 0.5, 0.2, 0.4, True),
        (0.0, 50.0, 0.5, 0.2, 1.0, False),
        (0.0, 50.0, 0.5, 0.2, 1.2, False),
        (1.0, -50.0, 1.0, 0.2, 0.0, True),  # held at 1
    ],
)
def test_the_rule(uniform: float, rise: float, probability: float, weight: float, penalty: float, truth: bool) -> None:
    assert branches(uniform, rise, probability, weight, penalty) is truth


def test_the_surprise_is_that_of_the_first_tokens() -> None:
    """Over many draws it is their entropy."""
    logps = torch.tensor([0.5, 0.25, 0.25]).log()
    tokens = torch.multinomial(logps.exp(), 40_000, replacement=True, generator=torch.Generator().manual_seed(0))
    entropy = float(-(logps.exp() * logps).sum())
    assert first_surprise(logps[tokens], 40_000) == pytest.approx(entropy, abs=0.02)
    assert first_surprise(torch.empty(0), 3) == 0
