"""Soft Adaptive Policy Optimization."""

from typing import Any

from grade_lightning.advantages import group_standardised
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.functional.gates import sapo
from grade_lightning.gates import by_advantage
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class SAPO(PolicyGradientModule):
    """A soft gate instead of a clip: a token's gradient fades as its ratio leaves 1, faster where A < 0.

    Args:
        tau_pos: how fast a token with a positive advantage fades.
        tau_neg: and one with a negative advantage.
        num_generations: completions for each prompt, a group.
        minibatches: optimizer steps for each window.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Soft Adaptive Policy Optimization (Gao et al., 2025), https://arxiv.org/abs/2511.20347
    """

    min_generations = 2

    def __init__(
        self,
        tau_pos: float = 1.0,
        tau_neg: float = 1.05,
        num_generations: int = 8,
        minibatches: int = 4,
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf)", tau_pos=tau_pos, tau_neg=tau_neg)
        super().__init__(
            advantage=group_standardised,
            level=token_level,
            gate=by_advantage(sapo, tau_pos=tau_pos, tau_neg=tau_neg),
            aggregate=sequence_mean,
            clips=False,
            num_generations=num_generations,
            minibatches=minibatches,
            **kwargs,
        )
