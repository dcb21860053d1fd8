"""Clipped importance-sampling policy optimisation."""

from typing import Any

from grade_lightning.advantages import group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import cispo
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class CISPO(PolicyGradientModule):
    """The importance weight is capped, and no token loses its gradient.

    Args:
        low: smallest importance weight (not 1 − ε).
        high: largest importance weight (not 1 + ε).
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | MiniMax-M1: Scaling Test-Time Compute Efficiently with Lightning Attention (2025),
          https://arxiv.org/abs/2506.13585
        | the cap of 5: The Art of Scaling Reinforcement Learning Compute for LLMs (Khatri et al., 2025),
          https://arxiv.org/abs/2510.13786
    """

    min_generations = 2

    def __init__(
        self, low: float = 0.0, high: float = 5.0, num_generations: int = 8, minibatches: int = 4, **kwargs: Any
    ) -> None:
        check_range("[0, 1]", low=low)
        check_range("[1, inf]", high=high)
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=by_advantage(cispo, low=low, high=high),
            aggregate=token_mean,
            clips=True,
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
