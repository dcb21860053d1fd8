"""Clipped importance-sampling policy optimisation."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class CISPO(PolicyGradientModule):
    """The importance weight is capped, and no token loses its gradient.

    Args:
        low: smallest importance weight (not 1 − ε).
        high: largest importance weight (not 1 + ε).
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        kl: the KL to the reference; the paper has none.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (2025),
          https://arxiv.org/abs/2506.13585
        | the cap of 5: The Art of Scaling Reinforcement Learning Compute for LLMs (Khatri et al., 2025),
          https://arxiv.org/abs/2510.13786
    """

    least_generations = 2

    def __init__(
        self,
        low: float = 0.0,
        high: float = 5.0,
        num_generations: int = 8,
        minibatches: int = 4,
        kl: KL = KL(),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, minibatches=minibatches, kl=kl, **kwargs)
        check_range("[0, 1]", low=low)
        check_range("[1, inf]", high=high)
        self.low = low
        self.high = high

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """(R − mean) / std of the group."""
        return advantages.group_standardised(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The ratio, capped."""
        return policy.cispo(ratio, advantages, self.low, self.high)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over all tokens."""
        return policy.token_mean(mask, totals)
