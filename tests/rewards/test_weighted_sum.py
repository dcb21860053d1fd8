"""Sums of rewards: totals, parts, gradients, and rewards that abstain."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.records import Rollout, Scores
from grade_lightning.rewards import ClassifierReward, Reward, WeightedSum
from tests.rewards.making import adjoint, constant, make_classifier, make_rollout, one_hot_gradient


def test_weighted_sum_adds_totals_and_adjoints() -> None:
    parts = [ClassifierReward.from_classifier(make_classifier(name)) for name in ("gpt2", "llama")]
    rollout = make_rollout()
    total = WeightedSum([*parts], [2.0, -0.5])
    assert total.differentiable
    scores = total.pathwise(rollout)
    one, two = (part.score(rollout).total for part in parts)
    torch.testing.assert_close(scores.total, 2 * one - 0.5 * two)
    torch.testing.assert_close(total(rollout), scores.total)
    truth = 2 * one_hot_gradient(parts[0], rollout) - 0.5 * one_hot_gradient(parts[1], rollout)
    assert (adjoint(scores) - truth).norm() < 1e-5 * truth.norm()
    assert torch.equal(scores.parts["classifier"], one)
    assert torch.equal(scores.parts["classifier-2"], two)


def test_where_one_reward_abstains_the_others_count_alone() -> None:
    total = WeightedSum([constant(1, None, None), constant(2, 3, None)], [10, 1])
    scores = total.score(make_rollout())
    assert scores.total[:2].tolist() == [12, 3]
    assert scores.total[2].isnan()
    assert scores.parts["rule"].isnan().tolist() == [False, True, True]
    assert scores.parts["rule-2"].isnan().tolist() == [False, False, True]


def test_parts_of_the_same_name_are_all_kept() -> None:
    three = WeightedSum([constant(1, 1, 1), constant(2, 2, 2), constant(3, 3, 3), constant(4, 4, 4, name="other")])
    parts = {name: float(value[0]) for name, value in three.score(make_rollout()).parts.items()}
    assert parts == {"rule": 1, "rule-2": 2, "rule-3": 3, "other": 4}


def test_parts_of_nested_sums_are_all_kept() -> None:
    nested = WeightedSum([constant(1, 1, 1), WeightedSum([constant(2, 2, 2), constant(3, 3, 3)])])
    parts = nested.score(make_rollout()).parts
    assert sorted(float(value[0]) for value in parts.values()) == [1, 2, 3]


def test_names_that_hold_a_hyphen_are_all_kept() -> None:
    parts = WeightedSum([constant(1, 1, 1, name="a-b"), constant(2, 2, 2, name="a-b")]).score(make_rollout()).parts
    assert sorted(float(value[0]) for value in parts.values()) == [1, 2]


def test_a_sum_is_differentiable_when_all_parts_are() -> None:
    classifier = ClassifierReward.from_classifier(make_classifier())
    assert WeightedSum([classifier]).differentiable
    assert not WeightedSum([classifier, constant(1, 1, 1)]).differentiable
    assert not WeightedSum([WeightedSum([classifier, constant(1, 1, 1)])]).differentiable


@pytest.mark.parametrize("weights", [[], [1.0, 2.0]])
def test_one_weight_for_each_reward(weights: list[float]) -> None:
    with pytest.raises(InputError, match="1 rewards but"):
        WeightedSum([constant(1)], weights)
    with pytest.raises(InputError, match="0 rewards"):
        WeightedSum([])


def test_infinities_that_cancel_are_no_abstention() -> None:
    total = WeightedSum([constant(math.inf, 1, None), constant(-math.inf, None, None)]).score(make_rollout()).total
    assert total[:2].tolist() == [math.inf, 1]
    assert total[2].isnan()


class Spread(Reward):
    """A reward of each token; it abstains of the second completion if that is wanted."""

    def __init__(self, abstains: bool = False) -> None:
        super().__init__()
        self.abstains = abstains

    def values(self, rollout: Rollout) -> Tensor:
        return rollout.completion_ids.double() * rollout.sampled

    def forward(self, rollout: Rollout) -> Tensor:
        total = self.values(rollout).sum(-1)
        return total.masked_fill(torch.tensor([False, self.abstains, False]), torch.nan)

    def score(self, rollout: Rollout) -> Scores:
        total, values = self(rollout), self.values(rollout)
        values[total.isnan()] = torch.nan
        return Scores(total, {self.name: total}, per_token=values)


@pytest.mark.parametrize("abstains", [False, True])
def test_rewards_of_tokens_are_added_token_by_token(abstains: bool) -> None:
    """One that has none is of the last sampled token; one that abstains is of none."""
    rollout = make_rollout()
    rollout = replace(rollout, sampled=torch.tensor([[1, 0, 1, 0], [1, 1, 0, 0], [1, 0, 0, 0]]).bool())
    scores = WeightedSum([Spread(abstains), constant(1, 3, None)], [2.0, 10.0]).score(rollout)
    middle = [0.0, 30.0] if abstains else [16.0, 30.0]
    truth = torch.tensor([[8.0, 0, 22, 0], [*middle, 0, 0], [0, 0, 0, 0]], dtype=torch.float64)
    assert scores.per_token is not None
    torch.testing.assert_close(scores.per_token, truth)
    torch.testing.assert_close(scores.per_token.sum(-1), scores.total)
    torch.testing.assert_close(scores.at_tokens(rollout.sampled), truth)
    alone = WeightedSum([Spread(abstains)], [2.0]).score(rollout).per_token
    assert alone is not None
    torch.testing.assert_close(alone, truth - torch.tensor([[0.0, 0, 10, 0], [0, 30, 0, 0], [0, 0, 0, 0]]))


def test_rewards_of_completions_are_not_spread() -> None:
    assert WeightedSum([constant(1, 2, 3), constant(1, 3, None)]).score(make_rollout()).per_token is None


def test_a_part_of_weight_zero_is_only_logged() -> None:
    """0 times an infinite reward is no abstention, and neither its value nor its gradient reaches the sum."""
    odd = constant(math.inf, None, 3, name="odd")
    scores = WeightedSum([constant(1, 2, None), odd], [2.0, 0.0]).score(make_rollout())
    torch.testing.assert_close(scores.total, torch.tensor([2.0, 4.0, torch.nan]), equal_nan=True)
    assert scores.parts["odd"].isinf().tolist() == [True, False, False]
    assert WeightedSum([constant(1, 2, 3)], [0.0]).score(make_rollout()).total.tolist() == [0, 0, 0]
    classifier = ClassifierReward.from_classifier(make_classifier())
    assert WeightedSum([classifier, classifier], [0.0, 1.0]).pathwise(make_rollout()).adjoints[1:] == []
