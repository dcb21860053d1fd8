"""Group Sequence Policy Optimization."""

from typing import Any

from grade_lightning.advantages import group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import sequence_level
from grade_lightning.modules import PolicyGradientModule


class GSPO(PolicyGradientModule):
    """The ratio is the sequence's, the geometric mean over its tokens, and is clipped as a whole.

    Args:
        epsilon_low: the ratio is clipped below at 1 − this.
        epsilon_high: and above at 1 + this.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Group Sequence Policy Optimization (Zheng et al., 2025), https://arxiv.org/abs/2507.18071
    """

    min_generations = 2

    def __init__(
        self,
        epsilon_low: float = 3e-4,
        epsilon_high: float = 4e-4,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        super().__init__(
            advantage=group_standardised,
            level=sequence_level,
            gate=by_advantage(clipped, low=1 - epsilon_low, high=1 + epsilon_high),
            aggregate=sequence_mean,
            clips=True,
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
