"""Sums of rewards that are normalised by group: by hand, whatever their scales."""

import statistics
from dataclasses import replace

import pytest
import torch

from grade_lightning.advantages import batch_standardised
from grade_lightning.distributed import Reduce
from grade_lightning.errors import InputError
from grade_lightning.records import Experience, Rollout
from grade_lightning.rewards import ClassifierReward, GroupNormalizedSum
from tests.rewards.making import constant, make_classifier, make_rollout


def rollout() -> Rollout:
    """Two prompts, of four completions and of two."""
    one = make_rollout().select(torch.tensor([0, 1, 2, 0, 1, 2]))
    return replace(one, groups=torch.tensor([5, 5, 3, 5, 3, 5]))


def normalised(values: list[float]) -> list[float]:
    mean, spread = statistics.mean(values), statistics.stdev(values)
    return [(value - mean) / (spread + 1e-4) for value in values]


def test_each_reward_is_normalised_over_its_group() -> None:
    large, small = [100.0, 300, 7, 200, 9, 400], [0.1, 0.1, 0.5, 0.3, 0.5, 0.2]
    summed = GroupNormalizedSum([constant(*large), constant(*small, name="small")], [1.0, 0.5])
    scores = summed.score(rollout())
    first, second = [0, 1, 3, 5], [2, 4]
    truth = [0.0] * 6
    for group in (first, second):
        ours = normalised([large[i] for i in group])
        others = normalised([small[i] for i in group]) if group is first else [0.0, 0.0]  # all equal
        for i, a, b in zip(group, ours, others, strict=True):
            truth[i] = a + 0.5 * b
    torch.testing.assert_close(scores.total, torch.tensor(truth), rtol=1e-4, atol=1e-5)
    assert scores.parts["rule"].tolist() == large
    rescaled = GroupNormalizedSum([constant(*[10 * x - 3 for x in large]), constant(*small, name="small")], [1.0, 0.5])
    torch.testing.assert_close(rescaled.score(rollout()).total, scores.total, rtol=1e-3, atol=1e-3)


def test_who_abstains_is_in_no_mean() -> None:
    scores = GroupNormalizedSum([constant(1.0, None, 4.0, 3.0, 4.0, None), constant(*[None] * 5, 1.0)]).score(rollout())
    spread = 2**0.5 + 1e-4
    truth = torch.tensor([-1 / spread, torch.nan, 0, 1 / spread, 0, 0])
    torch.testing.assert_close(scores.total, truth, equal_nan=True)


def test_an_infinite_reward_is_no_abstention() -> None:
    scores = GroupNormalizedSum([constant(1.0, float("inf"), 4.0, 3.0, 4.0, 2.0)]).score(rollout())
    assert scores.total[1].isinf()


def test_one_completion_has_no_group() -> None:
    """In evaluation the plain sum; in training it is refused, and by methods that need the gradient at once."""
    summed = GroupNormalizedSum([constant(1.0, 2.0, 3.0), constant(1.0, 1.0, None, name="other")], [2.0, 1.0])
    assert summed.eval().score(make_rollout()).total.tolist() == [3, 5, 6]
    with pytest.raises(InputError, match=r"normalises over the completions of a prompt.*num_generations above 1"):
        summed.train().score(make_rollout())
    classifier = GroupNormalizedSum([ClassifierReward.from_classifier(make_classifier())])
    assert not classifier.differentiable
    with pytest.raises(InputError, match="num_generations above 1"):
        classifier.pathwise(make_rollout())


def test_with_the_standard_deviation_of_the_batch_it_is_gdpo() -> None:
    """GRPO's `scale_rewards: batch` on it: the paper's second normalisation, over all completions."""
    large, small = [100.0, 300, 7, 200, 9, 400], [0.1, 0.1, 0.5, 0.3, 0.8, 0.2]
    summed = GroupNormalizedSum([constant(*large), constant(*small, name="small")], [1.0, 0.5])
    scores = summed.score(rollout())
    seen = Experience(rollout(), scores, rewards=scores.total, penalties=torch.zeros(6, 4))
    found = batch_standardised(seen, Reduce())
    values: dict[int, float] = {}
    for group in ([0, 1, 3, 5], [2, 4]):
        ours, others = (normalised([given[i] for i in group]) for given in (large, small))
        values |= {i: a + 0.5 * b for i, a, b in zip(group, ours, others, strict=True)}
    truth = torch.tensor(normalised([values[i] for i in range(6)]))
    torch.testing.assert_close(found, truth.unsqueeze(1).expand(6, 4), rtol=1e-3, atol=1e-4)
