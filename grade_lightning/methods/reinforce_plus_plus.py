"""REINFORCE++."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyExperience, PolicyGradientModule


class ReinforcePlusPlus(PolicyGradientModule):
    """No critic and no groups: the return from each token on, whitened over the batch, and PPO's clip.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        gamma: discount.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models (Hu, 2025),
          https://arxiv.org/abs/2501.03262
    """

    def __init__(self, epsilon: float = 0.2, gamma: float = 1.0, kl: KL = KL(0.01), **kwargs: Any) -> None:
        super().__init__(kl=kl, **kwargs)
        check_range("[0, inf]", epsilon=epsilon)
        check_range("[0, 1]", gamma=gamma)
        self.gamma = gamma
        self.epsilon = epsilon

    def advantages(self, experience: PolicyExperience) -> Tensor:
        """Whitened returns."""
        returns = advantages.discounted_returns(self.token_rewards(experience), experience.mask, self.gamma)
        return advantages.whiten(returns, experience.mask, self._total)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip."""
        return policy.clipped(ratio, advantages, 1 - self.epsilon, 1 + self.epsilon)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over all tokens."""
        return policy.token_mean(mask, totals)
