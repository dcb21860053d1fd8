"""Judges of pairs: tables of probabilities, from rewards, functions and models; intransitive ones too."""

import math
from pathlib import Path

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.modules.unpaired import mismatched
from grade_lightning.records import Experience, Rollout, Scores
from grade_lightning.rewards import (
    FunctionPreference,
    JudgePreference,
    JudgeReward,
    PairwiseJudge,
    Reward,
    RewardPreference,
)
from tests.conftest import VOCABULARY, make_tokenizer
from tests.rewards.making import make_rollout
from tests.rewards.sequences import words
from tests.rewards.test_judge import plain, write_judge


class Length(Reward):
    """Number of tokens."""

    def forward(self, rollout: Rollout) -> Tensor:
        return rollout.lengths.float()


def seen() -> Experience:
    """Two prompts with three completions each: of 4, 2 and 1 tokens, and the other way round."""
    rollout = make_rollout(row=["a", "b", "c"]).select(torch.tensor([0, 1, 2, 2, 1, 0]))
    total = Length().score(rollout).total
    return Experience(rollout, Scores(total, {}))


def beats(prompts: list[str], completions: list[str], others: list[str], row: list[str], **_: object) -> list[float]:
    """Rock, paper and scissors: each beats the next."""
    order = {"w4 w5 w6 w7": 0, "w8": 1, "": 2}
    return [float((order[one] - order[two]) % 3 == 2) for one, two in zip(completions, others, strict=True)]


def test_a_table_of_a_function_that_is_not_transitive() -> None:
    table = FunctionPreference(beats).table(seen(), 3)
    assert table[0].tolist() == [[0.5, 1, 0], [0, 0.5, 1], [1, 0, 0.5]]
    assert table[1].tolist() == [[0.5, 0, 1], [1, 0.5, 0], [0, 1, 0.5]]
    assert FunctionPreference(beats).name == "pairwise_judge beats"


def test_a_function_may_abstain_and_may_not_give_anything_else() -> None:
    silent = FunctionPreference(lambda completions, **_: [None, *[0.7] * (len(completions) - 1)])
    table = silent.table(seen(), 3)
    assert table.isnan().sum() == 2
    assert table[0, 0, 1].isnan()
    with pytest.raises(InputError, match=r"pairwise_judge <lambda>: gives .*1\.5.*; a preference is a probability"):
        FunctionPreference(lambda completions, **_: [1.5] * len(completions)).table(seen(), 3)


@pytest.mark.parametrize("given", [None, Length()], ids=["own", "another"])
def test_rewards_are_compared_as_bradley_and_terry_do(given: Reward | None) -> None:
    """The method's own scores, or those of another reward; the table is that of pair by pair."""
    judge, experience = RewardPreference(given, temperature=2.0), seen()
    table = judge.table(experience, 3)
    odds = torch.tensor([[0.0, 1.0, 1.5], [-1.0, 0.0, 0.5], [-1.5, -0.5, 0.0]])
    torch.testing.assert_close(table[0], odds.sigmoid())
    torch.testing.assert_close(table[1], odds.flip(0, 1).sigmoid())
    torch.testing.assert_close(table, PairwiseJudge.table(RewardPreference(Length(), 2.0), experience, 3))


def test_an_infinite_reward_is_no_sure_win() -> None:
    """It was taken for a judge that abstains, and the optimizer moved on with what it remembered."""
    experience = seen()
    experience.scores.total[1] = math.inf
    table = RewardPreference().table(experience, 3)
    assert table[0].isinf().tolist() == [[False, True, False], [True, False, True], [False, True, False]]
    assert table[1].isfinite().all()


def test_a_reward_of_ones_own_has_no_pairs_of_rollouts() -> None:
    with pytest.raises(InputError, match="RewardPreference: has no reward to compare rollouts by"):
        RewardPreference()(make_rollout(), make_rollout())


def test_a_model_is_asked_in_both_orders(tmp_path: Path) -> None:
    """Against a plain forward pass of each question; a question's braces in a prompt are text."""
    folder = write_judge(tmp_path)
    judge = JudgePreference(JudgeReward(str(folder), yes="w6", no="w7"), "w2 {prompt} w3 {other} w9 {completion} w4 w5")
    judge.load(make_tokenizer(), VOCABULARY)
    one = make_rollout()
    two = mismatched(one)

    def questions(first: Rollout, second: Rollout) -> list[str]:
        parts = zip(one.prompts, first.completions, second.completions, strict=True)
        return [f"w2 {prompt} w3 {a} w9 {b} w4 w5" for prompt, a, b in parts]

    better, worse = (plain(folder, words(), questions(*pair), 6, 7) for pair in ((two, one), (one, two)))
    torch.testing.assert_close(judge(one, two), (better + 1 - worse) / 2, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(judge(one, two), 1 - judge(two, one))
    assert (judge(one, two) - 0.5).abs().max() > 1e-4
    assert judge._begin("{other}", "x") == "w2 {other} w3 x w9 "


@pytest.mark.parametrize(
    "question",
    ["{completion} or not?", "{other} {prompt} {prompt} {completion}", "{other}", "{other} {completion}{completion}"],
)
def test_a_question_without_its_places(question: str) -> None:
    with pytest.raises(InputError, match=r"must have \{other\} once, and .* before one \{completion"):
        JudgePreference(JudgeReward("nowhere"), question)
