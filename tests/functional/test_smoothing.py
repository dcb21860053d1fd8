"""Advantages over several visits of a prompt: the reference's numbers, the first visit, abstentions."""

import pytest
import torch
from torch import Tensor

from grade_lightning.functional.advantages import group_standardised
from grade_lightning.functional.smoothing import group_moments, merged_moments, smoothed

NAN = float("nan")


def one(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


def test_the_second_visit_of_the_reference() -> None:
    """[0, 0, 1, 1], then [1, 1, 1, 1]: mean .75, variance .2292, and an advantage of +.2611 for each."""
    first, then = (torch.tensor([row], dtype=torch.float64) for row in ([0.0, 0, 1, 1], [1.0, 1, 1, 1]))
    mean, variance = group_moments(first)
    merged = merged_moments(one(1), (mean, variance), group_moments(then))
    assert [float(x) for x in merged] == [0.75, pytest.approx((1 / 3 + 0 + 0.5 * 0.25) / 2, rel=1e-12)]
    found = smoothed(then, one(1), mean, variance, eps=0.0)
    expected = 0.25 / ((1 / 3 + 0.125) / 2) ** 0.5 / 2
    assert expected == pytest.approx(0.2611, abs=5e-5)
    assert found.flatten().tolist() == pytest.approx([expected] * 4, rel=1e-12)


def test_the_first_visit_is_the_standardised_reward() -> None:
    rewards = torch.tensor([[0.0, 1.0, 0.3], [0.1, 0.1, 0.1], [0.7, NAN, 0.2], [NAN, NAN, NAN]])
    unused = torch.full((4,), 0.5)
    assert torch.equal(smoothed(rewards, torch.zeros(4), unused, unused), group_standardised(rewards))


def test_later_visits_by_hand() -> None:
    """Of both blends the smaller, completion by completion."""
    rewards = torch.tensor([[0.0, 0.2, 0.9, 1.0]], dtype=torch.float64)
    own = (rewards - rewards.mean()) / rewards.std()
    variance = (3 * 0.3 + rewards.var() + 3 / 4 * (rewards.mean() - 0.1) ** 2) / 4
    whole = (rewards - (3 * 0.1 + rewards.mean()) / 4) / variance.sqrt()
    near, far = (3 * own + whole) / 4, (own + 3 * whole) / 4
    expected = torch.where(near.abs() < far.abs(), near, far)
    assert 0 < int((expected == near).sum()) < 4
    torch.testing.assert_close(smoothed(rewards, one(3), one(0.1), one(0.3), eps=0.0), expected, rtol=1e-12, atol=0)


def test_visits_that_are_all_alike_have_no_advantage() -> None:
    assert not smoothed(torch.ones(1, 4), torch.ones(1), torch.ones(1), torch.zeros(1), eps=0.0).any()


def test_who_abstains_has_none() -> None:
    rewards = torch.tensor([[0.0, NAN, 0.5], [NAN, NAN, NAN]], dtype=torch.float64)
    before = torch.full((2,), 2.0, dtype=torch.float64)
    found = smoothed(rewards, before, before / 4, before / 8)
    alone = smoothed(rewards[:1, [0, 2]], before[:1], before[:1] / 4, before[:1] / 8)
    torch.testing.assert_close(found[0, [0, 2]], alone[0], rtol=1e-12, atol=0)
    assert found[0, 1] == 0
    assert not found[1].any()
    assert group_moments(rewards)[0].isnan().tolist() == [False, True]


def test_merging_one_by_one_is_the_mean_over_visits() -> None:
    groups = torch.rand(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    means, variances = group_moments(groups)
    found = means[0], variances[0]
    for i in range(1, 5):
        found = merged_moments(one(i)[0], found, (means[i], variances[i]))
    torch.testing.assert_close(found[0], means.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(found[1], variances.mean() + means.var(unbiased=False), rtol=1e-12, atol=0)
