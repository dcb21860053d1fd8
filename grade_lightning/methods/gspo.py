"""Group Sequence Policy Optimization."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class GSPO(PolicyGradientModule):
    """The ratio is the sequence's, the geometric mean over its tokens, and is clipped as a whole.

    Args:
        epsilon_low: the ratio is clipped below at 1 − this.
        epsilon_high: and above at 1 + this.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        kl: the KL to the reference; the paper has none.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Group Sequence Policy Optimization (Zheng et al., 2025), https://arxiv.org/abs/2507.18071
    """

    least_generations = 2

    def __init__(
        self,
        epsilon_low: float = 3e-4,
        epsilon_high: float = 4e-4,
        num_generations: int = 8,
        minibatches: int = 4,
        kl: KL = KL(),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, minibatches=minibatches, kl=kl, **kwargs)
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        self.epsilon_low = epsilon_low
        self.epsilon_high = epsilon_high

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """(R − mean) / std of the group."""
        return advantages.group_standardised(rewards)

    def level(self, values: Tensor, mask: Tensor) -> Tensor:
        """Means over the sequence."""
        return policy.sequence_level(values, mask)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip, its bounds apart."""
        return policy.clipped(ratio, advantages, 1 - self.epsilon_low, 1 + self.epsilon_high)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over the tokens of a completion, then over completions."""
        return policy.sequence_mean(mask, totals)
