"""Dynamic clipping policy optimization."""

from typing import Any

from grade_lightning.advantages import Smoothed, group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.gates import by_probability
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class DCPO(PolicyGradientModule):
    """A clip with more room for rare tokens, and advantages that include earlier completions of the prompt.

    Args:
        epsilon_low: how far the probability of a token may fall, about.
        epsilon_high: how far it may rise.
        dual: no gradient where A < 0 and the ratio exceeds this.
        memory: prompts that are remembered; 0: advantages of each group by itself.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | DCPO: Dynamic Clipping Policy Optimization (Yang et al., 2025), https://arxiv.org/abs/2509.02333
    """

    min_generations = 2

    def __init__(
        self,
        epsilon_low: float = 0.16,
        epsilon_high: float = 0.2,
        dual: float = 10.0,
        memory: int = 1_000_000,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf)", epsilon_low=epsilon_low, epsilon_high=epsilon_high, memory=memory)
        check_range("[1, inf]", dual=dual)
        super().__init__(
            advantage=Smoothed(memory) if memory else group_standardised,
            level=token_level,
            gate=by_probability(epsilon_low, epsilon_high, dual),
            aggregate=sequence_mean,
            clips=True,
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
