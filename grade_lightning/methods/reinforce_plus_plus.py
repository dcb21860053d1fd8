"""REINFORCE++."""

from typing import Any

from grade_lightning.advantages import whitened_returns
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class ReinforcePlusPlus(PolicyGradientModule):
    """No critic and no groups: the return from each token on, whitened over the batch, and PPO's clip.

    Args:
        epsilon: the ratio is clipped to 1 ± ε.
        gamma: discount.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | REINFORCE++: A Simple and Efficient Approach for Aligning Large Language Models (Hu, 2025),
          https://arxiv.org/abs/2501.03262
    """

    def __init__(self, epsilon: float = 0.2, gamma: float = 1.0, kl: KL = KL(0.01), **kwargs: Any) -> None:
        check_range("[0, inf]", epsilon=epsilon)
        check_range("[0, 1]", gamma=gamma)
        super().__init__(
            advantage=whitened_returns(gamma),
            level=token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=token_mean,
            clips=True,
            kl=kl,
            **kwargs,
        )
