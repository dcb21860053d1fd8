"""The penalty for completions that are too long."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from grade_lightning.advantages import whitened_returns
from grade_lightning.errors import InputError
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.policies import Policy
from grade_lightning.records import Prompts, Rollout, Scores
from grade_lightning.rewards import OverlongPenalty, Reward
from grade_lightning.rollouts import Sampler
from tests.conftest import make_model, make_prompts, make_tokenizer
from tests.rewards.making import constant, make_rollout


@pytest.mark.parametrize(
    ("buffer", "longest", "truth"),
    [
        (2, 4, [-1, 0, 0]),
        (3, 4, [-1, -1 / 3, 0]),
        (4, 4, [-1, -0.5, -0.25]),
        (2, 5, [-0.5, 0, 0]),
        (None, 5, [0, 0, 0]),  # one token of five
        (None, 4, None),  # none of four
        (0, 4, None),
    ],
)
def test_completions_of_four_two_and_one_tokens(buffer: int | None, longest: int, truth: list[float] | None) -> None:
    """On a straight line over the buffer; the default is a fifth of the longest completion, as in the paper."""
    found = OverlongPenalty(buffer)(make_rollout(), longest)
    assert (found is None) == (truth is None)
    if found is not None:
        torch.testing.assert_close(found, torch.tensor(truth, dtype=torch.float32))


def test_a_buffer_that_cannot_work_is_named() -> None:
    with pytest.raises(InputError, match="buffer"):
        OverlongPenalty(-1)


class Spread(Reward):
    """A third for each of the first three tokens, and so 1 for the completion."""

    def forward(self, rollout: Rollout) -> Tensor:
        return torch.ones(len(rollout.ids))

    def score(self, rollout: Rollout) -> Scores:
        total = self(rollout)
        return Scores(
            total,
            {self.name: total},
            per_token=(torch.arange(rollout.sampled.shape[1]) < 3).float().expand(len(total), -1) / 3,
        )


@pytest.mark.parametrize("spread", [False, True])
def test_a_penalty_is_part_of_the_reward_of_tokens_too(spread: bool) -> None:
    """However the reward is spread, that of all tokens is that of the completion."""
    reward = Spread() if spread else constant(1, 1, 1)
    module = PolicyGradientModule(
        advantage=whitened_returns(),
        level=token_level,
        gate=by_advantage(clipped, low=0.8, high=1.2),
        aggregate=token_mean,
        clips=True,
        policy=Policy.from_model(make_model(), make_tokenizer()),
        reward=reward,
        sampler=Sampler(max_new_tokens=6, min_new_tokens=4),
        length_penalty=OverlongPenalty(4),
    )
    seen = module.sample(Prompts.of(make_prompts()))
    total = seen.scores.total
    assert (total < 1).all()
    seen = replace(seen, rewards=total, penalties=torch.zeros(seen.rollout.sampled.shape))
    torch.testing.assert_close(seen.token_rewards().sum(-1), total)
