"""Virtual completions: the reference's numbers, abstentions, and nothing without any."""

import pytest
import torch

from grade_lightning.functional.advantages import group_standardised
from grade_lightning.functional.virtual import virtual_best

NAN = float("nan")


@pytest.mark.parametrize(("size", "expected"), [(8, -1 / 3), (16, -0.24253562503633297)])
def test_a_group_that_fails_is_pushed_away(size: int, expected: float) -> None:
    found = virtual_best(torch.zeros(1, size, dtype=torch.float64), 1.0, eps=0.0)
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=1e-12, atol=0)


@pytest.mark.parametrize("best", [1.0, 0.1])
def test_a_group_of_best_rewards_has_no_advantage(best: float) -> None:
    """Exactly none, also where the mean of eight of them is rounded."""
    assert not virtual_best(torch.full((1, 8), best), best).any()


def test_a_mixed_group_is_standardised_with_one_more() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.0, 0.5]], dtype=torch.float64)
    whole = torch.tensor([0.0, 1.0, 0.0, 0.5, 2.0, 2.0, 2.0], dtype=torch.float64)
    expected = (rewards - whole.mean()) / (whole.std() + 1e-4)
    torch.testing.assert_close(virtual_best(rewards, 2.0, copies=3), expected, rtol=1e-12, atol=0)


def test_without_virtual_completions_it_is_the_standardised_reward() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.3], [0.1, 0.1, 0.1], [0.7, NAN, 0.2], [NAN, NAN, NAN]])
    assert torch.equal(virtual_best(rewards, 1.0, copies=0), group_standardised(rewards))


def test_who_abstains_counts_in_nothing() -> None:
    found = virtual_best(torch.tensor([[0.0, NAN, 0.5], [NAN, NAN, NAN]]), 1.0)
    assert torch.equal(found[0, [0, 2]], virtual_best(torch.tensor([[0.0, 0.5]]), 1.0)[0])
    assert found[0, 1] == 0
    assert not found[1].any()
