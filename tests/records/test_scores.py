"""Scores: taken apart, joined, and spread over tokens."""

import torch

from grade_lightning.records import Scores
from grade_lightning.rewards import ClassifierReward, WeightedSum
from tests.rewards.making import constant, make_classifier, make_rollout


def test_scores_are_taken_apart_and_joined_with_all_their_parts() -> None:
    scores = WeightedSum([constant(1, None, 3), constant(2, None, 4, name="other")]).score(make_rollout())
    part = scores.select(torch.tensor([2, 1]))
    assert part.total[0] == 7
    assert part.total[1].isnan()
    assert {name: value[0].item() for name, value in part.parts.items()} == {"rule": 3, "other": 4}
    assert all(value[1].isnan() for value in part.parts.values())
    assert scores.total.shape == (3,)

    joined = Scores.join([part, scores])
    torch.testing.assert_close(joined.total, torch.tensor([7, torch.nan, 3, torch.nan, 7]), equal_nan=True)
    assert joined.parts.keys() == scores.parts.keys()
    torch.testing.assert_close(joined.parts["rule"], torch.tensor([3, torch.nan, 1, torch.nan, 3]), equal_nan=True)


def test_parts_of_scores_have_no_adjoints() -> None:
    """They are of all rows: a method that sends gradients through the reward trains on whole rollouts."""
    scores = ClassifierReward.from_classifier(make_classifier()).pathwise(make_rollout())
    assert len(scores.adjoints) == 1
    assert scores.select(torch.tensor([0])).adjoints == []
    assert Scores.join([scores, scores]).adjoints == []


def test_a_reward_of_tokens_is_taken_apart_and_joined_as_it_is_spread() -> None:
    """Cut to the length of the part, padded to the longest of the whole, and packed."""
    spread = torch.tensor([[1.0, 2.0, 0.0], [4.0, 0.0, 0.0]])
    scores = Scores(spread.sum(-1), {}, per_token=spread)
    part = scores.select(torch.tensor([1, 0]), 2)
    assert part.per_token is not None
    assert part.per_token.tolist() == [[4, 0], [1, 2]]
    joined = Scores.join([part, scores])
    assert joined.per_token is not None
    assert joined.per_token.tolist() == [[4, 0, 0], [1, 2, 0], [1, 2, 0], [4, 0, 0]]
    again = Scores(**joined.pack())
    assert again.per_token is not None
    assert torch.equal(again.per_token, joined.per_token)
    assert torch.equal(again.total, joined.total)


def test_a_reward_of_a_completion_is_of_its_last_sampled_token() -> None:
    scores = Scores(torch.tensor([1.0, torch.nan, 3.0]), {})
    mask = torch.tensor([[True, False, True, False], [True, True, False, False], [False, False, False, False]])
    assert scores.at_tokens(mask).tolist() == [[0, 0, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
