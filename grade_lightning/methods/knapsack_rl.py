"""Knapsack reinforcement learning: a budget of completions that goes where there is something to learn."""

from typing import Any

from torch import Tensor

from grade_lightning.advantages import grouped
from grade_lightning.budget import KnapsackBudget
from grade_lightning.errors import check_range
from grade_lightning.functional.advantages import group_standardised
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class KnapsackRL(PolicyGradientModule):
    """GRPO with groups of different sizes: many completions of prompts that succeed sometimes, few of the others.

    Args:
        threshold: a reward of this or more is a success.
        min_rollouts: completions of a prompt whose success rate is known.
        max_rollouts: of one that succeeds sometimes.
        bound: an advantage is held within ± this.
        epsilon_low: the ratio is clipped below at 1 − this.
        epsilon_high: and above at 1 + this.
        dual: no gradient where A < 0 and the ratio exceeds this.
        num_generations: completions for each prompt on average.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Knapsack RL: Unlocking Exploration of LLMs via Optimizing Budget Allocation (Li et al., 2025),
          https://arxiv.org/abs/2509.25849
    """

    min_generations = 2

    def __init__(
        self,
        threshold: float = 0.5,
        min_rollouts: int = 2,
        max_rollouts: int = 128,
        bound: float = 5.0,
        epsilon_low: float = 0.2,
        epsilon_high: float = 0.28,
        dual: float = 10.0,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[1, inf)", min_rollouts=min_rollouts)
        check_range(f"[{min_rollouts}, inf)", max_rollouts=max_rollouts)
        check_range("(0, inf]", bound=bound)
        check_range("[0, 1]", epsilon_low=epsilon_low)
        check_range("[0, inf]", epsilon_high=epsilon_high)
        check_range("[1, inf]", dual=dual)

        def bounded(rewards: Tensor) -> Tensor:
            return group_standardised(rewards).clamp(-bound, bound)

        super().__init__(
            advantage=grouped(bounded),
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon_low, high=1 + epsilon_high, dual=dual),
            aggregate=token_mean,
            clips=True,
            selection=KnapsackBudget(threshold, min_rollouts, max_rollouts),
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
