"""Decoupled clip and dynamic sampling policy optimisation."""

from typing import Any

from grade_lightning.advantages import group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.rewards import OverlongPenalty
from grade_lightning.selection import DynamicSampling


class DAPO(PolicyGradientModule):
    """GRPO with a higher upper clip, a mean over tokens, no groups of equal rewards, and a penalty for overlong text.

    Args:
        epsilon_low: the ratio is clipped below at 1 − this.
        epsilon_high: and above at 1 + this.
        max_retries: rounds of sampling for other groups where rewards are all equal; 0: no dynamic sampling.
        overlong_buffer: over how many tokens before `sampler.max_new_tokens` the penalty grows from 0 to 1; a fifth
            of them by default, as in the paper; 0: no penalty.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | DAPO: An Open-Source LLM Reinforcement Learning System at Scale (Yu et al., 2025),
          https://arxiv.org/abs/2503.14476
    """

    min_generations = 2

    def __init__(
        self,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        max_retries: int = 2,
        overlong_buffer: int | None = None,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        check_range("[0, inf)", overlong_buffer=overlong_buffer)
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon_low, high=1 + epsilon_high),
            aggregate=token_mean,
            clips=True,
            selection=DynamicSampling(max_retries),
            length_penalty=OverlongPenalty(overlong_buffer),
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
