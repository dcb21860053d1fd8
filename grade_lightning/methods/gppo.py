"""Gradient-preserving clipping."""

from typing import Any, Literal

from grade_lightning.advantages import group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import gppo
from grade_lightning.gates import by_advantage, standardised
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class GPPO(PolicyGradientModule):
    """PPO's clip, but a token beyond a bound keeps that bound as its coefficient instead of losing its gradient.

    Args:
        epsilon_low: the lower bound is 1 − this.
        epsilon_high: the upper bound is 1 + this.
        low_scale: factor of the coefficient below the lower bound (CE-GPPO: 0.5 to 0.75).
        high_scale: and above the upper bound.
        dual: no gradient where A < 0 and the ratio exceeds this.
        ratios: experimental: the gate decides by the ratio as it is (`plain`), over the geometric mean of all ratios of
            the batch (`centred`), or with log-ratios also scaled down to the deviation `spread` (`standardised`).
        spread: standard deviation of `standardised` log-ratios, at most.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Klear-Reasoner: Advancing Reasoning Capability via Gradient-Preserving Clipping Policy Optimization
          (Su et al., 2025), https://arxiv.org/abs/2508.07629
        | the ratios, loosely: GRPO-Guard (2025), https://arxiv.org/abs/2510.22319
        | the scales: CE-GPPO (2025), https://arxiv.org/abs/2509.20712
    """

    min_generations = 2

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        low_scale: float = 1.0,
        high_scale: float = 1.0,
        dual: float = 10.0,
        ratios: Literal["plain", "centred", "standardised"] = "plain",
        spread: float = 0.1,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        check_range("[0, inf)", low_scale=low_scale, high_scale=high_scale)
        check_range("[1, inf]", dual=dual)
        check_range("(0, inf)", spread=spread)
        bounds = {"low": 1 - epsilon_low, "high": 1 + epsilon_high}
        gate = by_advantage(gppo, **bounds, low_scale=low_scale, high_scale=high_scale, dual=dual)
        if ratios != "plain":
            gate = standardised(gate, spread if ratios == "standardised" else None, lambda x: self.reduce.sum(x))
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=gate,
            aggregate=token_mean,
            clips=True,
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
