"""REINFORCE with a moving baseline."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


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
        check_range("[0, 1]", decay=decay)
        self.decay = decay

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """R − the average of the past; at the very first step, of the batch itself."""
        return rewards - self.baseline(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """None: the completions are the policy's own."""
        return policy.reinforce(ratio, advantages)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Sum over tokens, mean over completions."""
        return policy.sequence_sum(mask, totals)
