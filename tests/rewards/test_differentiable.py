"""Pathwise gradients against those at the one-hot tokens."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from grade_lightning.rewards import ClassifierReward, WeightedSum
from tests.conftest import CONFIGS
from tests.rewards.making import adjoint, make_classifier, make_rollout, one_hot_gradient


@pytest.mark.parametrize("output", ["probability", "logit"])
@pytest.mark.parametrize("name", CONFIGS)
def test_pathwise_is_the_gradient_at_the_one_hot_tokens(name: str, output: Any) -> None:
    reward, rollout = ClassifierReward.from_classifier(make_classifier(name), output), make_rollout()
    scores, truth = reward.pathwise(rollout), one_hot_gradient(reward, rollout)
    # transformers computes RMSNorm and rotary embeddings in float32 even in a float64 model
    tolerance = 1e-12 if name == "gpt2" else 1e-5
    assert (adjoint(scores) - truth).norm() < tolerance * truth.norm()
    assert (truth[0].norm(dim=-1) > 0).all()
    assert (adjoint(scores)[~rollout.completion_mask] == 0).all()
    torch.testing.assert_close(scores.total, reward.score(rollout).total)
    assert not scores.total.requires_grad


def test_pathwise_works_without_gradients_and_leaves_none() -> None:
    reward, rollout = ClassifierReward.from_classifier(make_classifier()), make_rollout()
    with torch.no_grad():
        scores = reward.pathwise(rollout)
    torch.testing.assert_close(adjoint(scores), one_hot_gradient(reward, rollout))
    assert all(parameter.grad is None for parameter in reward.parameters())


class Abstains(ClassifierReward):
    """Of the second completion."""

    how = "add"

    def score_embeddings(self, embeddings: Tensor, mask: Tensor) -> Tensor:
        scores, nan = super().score_embeddings(embeddings, mask), torch.tensor([0.0, math.nan, 0.0])
        if self.how == "add":
            return scores + nan
        return scores * (1 + nan) if self.how == "multiply" else scores.where(~nan.isnan(), math.nan)


@pytest.mark.parametrize("how", ["add", "multiply", "where"])
def test_a_differentiable_reward_that_abstains_moves_nothing(how: str) -> None:
    classifier, rollout = make_classifier(), make_rollout()
    reward, plain = Abstains.from_classifier(classifier), ClassifierReward.from_classifier(classifier)
    assert isinstance(reward, Abstains)
    reward.how = how
    answered = torch.tensor([0, 2])
    alone, both = reward.pathwise(rollout), WeightedSum([reward, plain], [2.0, 3.0]).pathwise(rollout)
    assert alone.total.isnan().tolist() == [False, True, False]
    assert not adjoint(alone)[1].any()
    torch.testing.assert_close(adjoint(alone)[answered], adjoint(plain.pathwise(rollout))[answered])
    torch.testing.assert_close(both.total[1], 3 * plain(rollout)[1])
    torch.testing.assert_close(adjoint(both)[1], 3 * adjoint(plain.pathwise(rollout))[1])
