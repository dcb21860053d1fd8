"""The reward of a module that has none."""

import torch
from torch import Tensor

from grade_lightning.records import Rollout, Scores

from .base import Reward


class NoReward(Reward):
    """Abstains always: for learning from preferences alone."""

    def forward(self, rollout: Rollout) -> Tensor:
        """NaN."""
        return torch.full((len(rollout.ids),), torch.nan, device=rollout.ids.device)

    def score(self, rollout: Rollout) -> Scores:
        """NaN, of no parts."""
        return Scores(self(rollout), {})
