"""Improvement: a table as the actor, what it is asked, and what is remembered."""

import pytest
import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.records import Rollout
from grade_lightning.rewards import ImprovementReward, Reward
from tests.rewards.making import make_rollout

ASKED: list[list[str]] = []
HELP = {"w8": "w5 w5 w5", "w4 w5 w6 w7": ""}


def table(prompts: list[str]) -> list[str]:
    """Says more words after some completions, fewer after others, and one without help."""
    ASKED.append(prompts)
    return [
        next((answer for words, answer in HELP.items() if prompt.endswith(f"> {words}")), "w9") for prompt in prompts
    ]


class Words(Reward):
    """Number of words of the completion; the columns are those of the row."""

    def forward(self, rollout: Rollout) -> Tensor:
        assert len(rollout.columns.get("row", rollout.prompts)) == len(rollout.prompts)
        return torch.tensor([float(len(text.split())) for text in rollout.completions])


def test_the_difference_that_a_completion_makes() -> None:
    ASKED.clear()
    rollout = make_rollout(row=["a", "b", "c"])
    reward = ImprovementReward(table, Words(), template="{prompt} > {completion}")
    assert reward.score(rollout).total.tolist() == [-1, 2, 0]
    first, *alone = ASKED
    pairs = zip(rollout.prompts, rollout.completions, strict=True)
    assert first == [f"{prompt} > {completion}" for prompt, completion in pairs]
    assert alone == [[prompt] for prompt in rollout.prompts]
    reward(rollout)
    assert len(ASKED) == 5  # without help each prompt is tried once
    assert reward._ask("{completion}", "{prompt}") == "{completion} > {prompt}"


def test_trials_are_averaged_and_help_is_drawn_with_the_step_s_noise() -> None:
    """What is scored without help has a seed of its own: a resumed run, whose memory is empty, draws the same."""

    def noisy(prompts: list[str]) -> list[str]:
        return ["w5 " * int(torch.randint(0, 9, ())) for _ in prompts]

    rollout = make_rollout()
    scores = []
    for seed in (0, 1):
        reward = ImprovementReward(noisy, Words(), trials=2)
        torch.manual_seed(seed)
        reward(rollout)
        after = torch.rand(())
        scores.append(dict(reward._known))
        torch.manual_seed(seed)
        reward(rollout)  # now from memory
        assert torch.rand(()) == after
    assert scores[0] == scores[1]
    assert len(set(scores[0].values())) > 1


def test_what_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match=r"must have \{prompt\} and \{completion\} once each"):
        ImprovementReward(table, Words(), template="{completion}")
    with pytest.raises(InputError, match=r"the actor must return a text for each of 3 prompts"):
        ImprovementReward(lambda prompts: prompts[:1], Words())(make_rollout())
