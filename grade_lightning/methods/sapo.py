"""Soft Adaptive Policy Optimization."""

from typing import Any

from torch import Tensor

from grade_lightning.errors import check_range
from grade_lightning.functional import advantages, policy
from grade_lightning.functional.policy import Totals
from grade_lightning.kl import KL
from grade_lightning.policy_gradient import PolicyGradientModule


class SAPO(PolicyGradientModule):
    """A soft gate in the place of the clip: a token fades out as its ratio leaves 1, faster where A < 0.

    Args:
        tau_pos: how fast a token with a positive advantage fades.
        tau_neg: and one with a negative advantage.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        kl: the KL to the reference; the paper has none.
        **kwargs: those of :class:`~grade_lightning.policy_gradient.PolicyGradientModule`.

    References:
        | Soft Adaptive Policy Optimization (Gao et al., 2025), https://arxiv.org/abs/2511.20347
    """

    clips = False
    least_generations = 2

    def __init__(
        self,
        tau_pos: float = 1.0,
        tau_neg: float = 1.05,
        num_generations: int = 8,
        minibatches: int = 4,
        kl: KL = KL(),
        **kwargs: Any,
    ) -> None:
        super().__init__(num_generations=num_generations, minibatches=minibatches, kl=kl, **kwargs)
        check_range("[0, inf)", tau_pos=tau_pos, tau_neg=tau_neg)
        self.tau_pos = tau_pos
        self.tau_neg = tau_neg

    def group_advantages(self, rewards: Tensor) -> Tensor:
        """(R − mean) / std of the group."""
        return advantages.group_standardised(rewards)

    def gate(self, ratio: Tensor, advantages: Tensor) -> Tensor:
        """The soft gate."""
        return policy.sapo(ratio, advantages, self.tau_pos, self.tau_neg)

    def aggregate(self, mask: Tensor, totals: Totals) -> Tensor:
        """Mean over the tokens of a completion, then over completions."""
        return policy.sequence_mean(mask, totals)
