"""REINFORCE Leave-One-Out."""

from typing import Any

from torch import Tensor

from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class RLOO(PolicyGradientModule):
    """The baseline of a completion is the mean reward of the others of its prompt; the KL is part of the reward.

    Args:
        num_generations: completions for each prompt.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Back to Basics: Revisiting REINFORCE Style Optimization for Learning from Human Feedback in LLMs
          (Ahmadian et al., 2024), https://arxiv.org/abs/2402.14740
    """

    clips = False
    least_generations = 2

    def __init__(self, num_generations: int = 4, kl: KL = KL(0.05, clock="sequence"), **kwargs: Any) -> None:
        super().__init__(num_generations=num_generations, kl=kl, **kwargs)

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """R − the mean of the others."""
        return advantages.leave_one_out(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """None: the completions are the policy's own."""
        return policy.reinforce(ratio, advantages)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Sum over tokens, mean over completions."""
        return policy.sequence_sum(mask, totals)
