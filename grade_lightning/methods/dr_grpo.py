"""GRPO done right: no division by a length or by a standard deviation."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class DrGRPO(PolicyGradientModule):
    """GRPO without its two biases: advantages are only centred, and tokens of all completions weigh the same.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        num_generations: completions for each prompt, a group.
        kl: the KL to the reference; the paper has none.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Understanding R1-Zero-Like Training: A Critical Perspective (Liu et al., 2025),
          https://arxiv.org/abs/2503.20783
    """

    least_generations = 2

    def __init__(
        self,
        epsilon: float = 0.2,
        num_generations: int = 8,
        kl: KL = KL(),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, kl=kl, **kwargs)
        check_range("[0, inf]", epsilon=epsilon)
        self.epsilon = epsilon

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """R − the group's mean."""
        return advantages.group_centred(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip."""
        return policy.clipped(ratio, advantages, 1 - self.epsilon, 1 + self.epsilon)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Sum over tokens over the longest possible completion, mean over completions."""
        return policy.constant(mask, totals, self.sampler.max_new_tokens)
