"""Group Relative Policy Optimization."""

from typing import Any, Literal

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class GRPO(PolicyGradientModule):
    """The advantage is the standardised reward within the completions of one prompt; a clipped ratio; k3 in the loss.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        scale_rewards: whose standard deviation a reward is divided by: the `group`'s, the `batch`'s, or `none`.
        num_generations: completions for each prompt, a group.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (Shao et al., 2024),
          https://arxiv.org/abs/2402.03300
    """

    least_generations = 2

    def __init__(
        self,
        epsilon: float = 0.2,
        scale_rewards: Literal["group", "batch", "none"] = "group",
        num_generations: int = 8,
        kl: KL = KL(0.04, "k3", "loss"),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, kl=kl, **kwargs)
        check_range("[0, inf]", epsilon=epsilon)
        self.epsilon = epsilon
        self.scale_rewards = scale_rewards

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """(R − the group's mean) / the standard deviation."""
        if self.scale_rewards == "group":
            return advantages.group_standardised(rewards)
        if self.scale_rewards == "batch":
            return advantages.batch_standardised(rewards, total=self._total)
        return advantages.group_centred(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """PPO's clip."""
        return policy.clipped(ratio, advantages, 1 - self.epsilon, 1 + self.epsilon)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over the tokens of a completion, then over completions."""
        return policy.sequence_mean(mask, totals)
