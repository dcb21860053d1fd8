"""Gradient-preserving clipping."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class GPPO(PolicyGradientModule):
    """PPO's clip, but a token beyond a bound keeps that bound as its coefficient instead of losing its gradient.

    Args:
        epsilon_low: the lower bound is 1 − this.
        epsilon_high: the upper bound is 1 + this.
        low_scale: factor of the coefficient below the lower bound (CE-GPPO: 0.5 to 0.75).
        high_scale: and above the upper bound.
        dual: no gradient where A < 0 and the ratio exceeds this.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        kl: the KL to the reference; the paper has none.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization
          (Su et al., 2025), https://arxiv.org/abs/2508.07629
        | the scales: CE-GPPO (2025), https://arxiv.org/abs/2509.20712
    """

    least_generations = 2

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        low_scale: float = 1.0,
        high_scale: float = 1.0,
        dual: float = 10.0,
        num_generations: int = 8,
        minibatches: int = 4,
        kl: KL = KL(),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, minibatches=minibatches, kl=kl, **kwargs)
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        check_range("[0, inf)", low_scale=low_scale, high_scale=high_scale)
        check_range("[1, inf]", dual=dual)
        self.low = 1 - epsilon_low
        self.high = 1 + epsilon_high
        self.low_scale = low_scale
        self.high_scale = high_scale
        self.dual = dual

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """(R − mean) / std of the group."""
        return advantages.group_standardised(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The gradient-preserving clip."""
        return policy.gppo(ratio, advantages, self.low, self.high, self.low_scale, self.high_scale, self.dual)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over all tokens."""
        return policy.token_mean(mask, totals)
