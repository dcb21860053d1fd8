"""What the environment gave for each turn, where the turn ended."""

import torch
from torch import Tensor

from grade_lightning.errors import InputError
from grade_lightning.functional.turns import at_turn_ends
from grade_lightning.records import Rollout, Scores

from .base import Reward


class TurnRewards(Reward):
    """The rewards that the environment of `Turns` gave, each at the last token that the policy said in its turn.

    The total is their sum. A method whose advantages are of tokens (PPO, TurnPPO, STPPO, ReinforcePlusPlus) does not
    credit a turn with what was given before it; one that compares completions (GRPO, RLOO) sees the total. Where an
    environment failed it abstains.
    """

    def forward(self, rollout: Rollout) -> Tensor:
        """The sums, (B,)."""
        return self.score(rollout).total

    def score(self, rollout: Rollout) -> Scores:
        """The sums, and how they are spread over the tokens.

        Raises:
            InputError: no environment spoke.
        """
        if rollout.turns is None or "turn_rewards" not in rollout.columns:
            raise InputError(
                f"reward {self.name}: no rewards for turns were given; use an environment: "
                "--model.sampler.engine Turns --model.sampler.engine.environment …"
            )
        given: list[list[float] | None] = rollout.columns["turn_rewards"]
        table, device = torch.zeros(rollout.sampled.shape), rollout.sampled.device
        for row, rewards in enumerate(given):
            table[row, : len(rewards or [])] = torch.tensor(rewards or [])
        failed = torch.tensor([rewards is None for rewards in given], device=device)
        table = table.to(device)
        total = table.sum(-1).masked_fill(failed, torch.nan)
        return Scores(total, {self.name: total}, per_token=at_turn_ends(table, rollout.sampled, rollout.turns))
