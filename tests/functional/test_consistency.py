"""Consistency of answers: entropy by hand, the factor's ends, statistics over processes."""

import math

import pytest
import torch

from grade_lightning.functional.consistency import (
    answer_entropy,
    consistent_reward,
    local_share,
    over_prompts,
    two_sources,
)


def test_entropy_against_a_loop() -> None:
    """Answers of four prompts, of which some are missing; one prompt has none at all."""
    answers = torch.tensor([[0, 1, 1, 2], [3, 3, 3, -1], [-1, -1, -1, -1], [0, 1, -1, 0]])
    for row, found in zip(answers.tolist(), answer_entropy(answers).tolist(), strict=True):
        known = [a for a in row if a >= 0]
        shares = [known.count(a) / len(known) for a in set(known)]
        assert found == pytest.approx(-sum(p * math.log2(p) for p in shares), abs=1e-6)


@pytest.mark.parametrize("size", [2, 4, 8])
def test_the_factor_runs_from_one_to_one_in_g(size: int) -> None:
    rewards = torch.full((2, size), 0.6, dtype=torch.float64)
    answers = torch.stack([torch.zeros(size, dtype=torch.long), torch.arange(size)])
    sizes = torch.full((2,), float(size), dtype=torch.float64)
    found = consistent_reward(rewards, answer_entropy(answers).double(), sizes)
    torch.testing.assert_close(found, torch.tensor([0.6, 0.6 / size], dtype=torch.float64))


def test_of_four_different_answers() -> None:
    """Two bits, and a quarter."""
    entropy = answer_entropy(torch.tensor([[4, 7, 1, 0]]))
    assert entropy.tolist() == [2.0]
    assert consistent_reward(torch.ones(1, 4), entropy, torch.tensor([4.0])).tolist() == [0.25]


def test_statistics_are_of_all_prompts() -> None:
    rewards = torch.randn(7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    rewards[3] = math.nan
    known = rewards[~rewards.isnan()]
    truth = ((rewards - known.mean()) / (known.std() + 1e-6)).nan_to_num(nan=0.0)
    torch.testing.assert_close(over_prompts(rewards), truth)
    sent: list[torch.Tensor] = []
    for part in (rewards[:3], rewards[3:]):
        over_prompts(part, total=lambda x: (sent.append(x), x)[1])  # type: ignore[func-returns-value]
    whole = sum(sent, torch.zeros(()))
    halves = [over_prompts(part, total=lambda _: whole) for part in (rewards[:3], rewards[3:])]
    torch.testing.assert_close(torch.cat(halves), truth)


def test_the_share_is_a_half_at_the_threshold() -> None:
    found = local_share(torch.tensor([0.0, 1.0, 2.0]), sharpness=5.0, threshold=1.0)
    assert found.tolist() == pytest.approx([1 / (1 + math.exp(5)), 0.5, 1 / (1 + math.exp(-5))])


@pytest.mark.parametrize("forced", [False, True])
def test_equal_rewards_leave_the_group_nothing_if_forced(forced: bool) -> None:
    """Shares are those of the answers' entropies, but where a group of equal rewards is forced to other prompts."""
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0], [0.5, 0.5]], dtype=torch.float64)
    answers = torch.tensor([[0, 1], [2, 2], [3, 4]])
    found = two_sources(rewards, answers, sharpness=2.0, threshold=1.0, forced=forced)
    assert found.entropies.tolist() == [1, 0, 1]
    low = 1 / (1 + math.exp(2))
    assert found.share.tolist() == pytest.approx([0.5, 0, 0] if forced else [0.5, low, 0.5])
    means = torch.tensor([0.5 * 0.5, 1.0, 0.5 * 0.5], dtype=torch.float64)
    torch.testing.assert_close(found.others, over_prompts(means))
