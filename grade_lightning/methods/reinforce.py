"""REINFORCE with a moving baseline."""

from typing import Any

import torch
from torch import Tensor

from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyExperience, PolicyGradientModule


class Reinforce(PolicyGradientModule):
    """Each completion's log-probability times what its reward exceeds the average of the past by.

    Args:
        decay: of the moving average of the rewards.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992)
    """

    clips = False

    def __init__(self, decay: float = 0.9, kl: KL = KL(0.01), **kwargs: Any) -> None:
        super().__init__(kl=kl, **kwargs)
        self.decay = decay

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """R − the average of the past; at the very first step, of the batch itself."""
        baseline = self.running.get("baseline")
        return rewards - (self._mean_reward(rewards) if baseline is None else baseline)

    def after_window(self, window: PolicyExperience, kl: Tensor) -> None:
        """Move the baseline."""
        super().after_window(window, kl)
        baseline = torch.tensor(self.running.get("baseline", torch.nan), dtype=torch.float64)
        moved = advantages.ema(baseline, self._mean_reward(window.scores.total).double().cpu(), self.decay)
        if not moved.isnan():
            self.running["baseline"] = float(moved)

    def _mean_reward(self, rewards: Tensor) -> Tensor:
        """Of all completions that have one, on all processes; NaN if there are none."""
        sums = self._total(torch.stack([rewards.nansum(), (~rewards.isnan()).sum().to(rewards.dtype)]))
        return sums[0] / sums[1]

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """None: the completions are the policy's own."""
        return policy.reinforce(ratio, advantages)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Sum over tokens, mean over completions."""
        return policy.sequence_sum(mask, totals)
