"""Agentic entropy-balanced policy optimisation."""

from typing import Any

from grade_lightning.advantages import entropy_balanced, group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import gppo
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class AgenticAEPO(PolicyGradientModule):
    """GRPO with more weight for tokens of high entropy; a ratio above the upper bound is replaced by the bound.

    Args:
        entropy_scale: a: an advantage is multiplied by 1 + a z, z the standardised entropy of its token.
        epsilon_low: no gradient where A < 0 and the ratio is below 1 − this.
        epsilon_high: where A > 0 and the ratio exceeds 1 + this, that bound is the coefficient.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Agentic Entropy-Balanced Policy Optimization (Dong et al., 2025), https://arxiv.org/abs/2510.14545
    """

    min_generations = 2

    def __init__(
        self,
        entropy_scale: float = 0.2,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.2,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf)", entropy_scale=entropy_scale)
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        super().__init__(
            advantage=entropy_balanced(group_standardised, entropy_scale),
            level=token_level,
            gate=by_advantage(gppo, low=1 - epsilon_low, high=1 + epsilon_high, low_scale=0.0),
            aggregate=token_mean,
            clips=True,
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
