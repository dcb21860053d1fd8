"""Curvature-aware policy optimisation."""

from typing import Any

from grade_lightning.advantages import group_standardised
from grade_lightning.curvature import CurvatureMask
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class CAPO(PolicyGradientModule):
    """GRPO without the tokens whose own step would change the objective or the policy too much.

    Args:
        max_objective_change: |m_H| of a token that is trained on lies below this; grows with the learning rate.
        max_policy_change: and m_F below this; grows with the square of the learning rate.
        epsilon: the ratio is clipped to 1 ± ε.
        num_generations: completions for each prompt, a group.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | CAPO: Stabilizing Policy Gradients for Sample-Efficient Reinforcement Learning in LLM Reasoning
          (Melo et al., 2025), https://arxiv.org/abs/2510.00819
    """

    min_generations = 2

    def __init__(
        self,
        max_objective_change: float = 0.2,
        max_policy_change: float = 0.04,
        epsilon: float = 0.2,
        num_generations: int = 8,
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf]", epsilon=epsilon)
        super().__init__(
            advantage=group_standardised,
            selection=CurvatureMask(self.learning_rate, max_objective_change, max_policy_change),
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=sequence_mean,
            clips=True,
            num_generations=num_generations,
            **kwargs,
        )
