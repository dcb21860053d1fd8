"""REINFORCE with a moving baseline."""

from typing import Any

from grade_lightning.advantages import Baseline
from grade_lightning.functional.aggregation import sequence_sum
from grade_lightning.functional.gates import reinforce
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level
from grade_lightning.modules import PolicyGradientModule


class Reinforce(PolicyGradientModule):
    """The log-probability of a completion times its reward minus the average of earlier rewards.

    Args:
        decay: of the moving average of the rewards.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | Simple Statistical Gradient-Following Algorithms for Connectionist Reinforcement Learning (Williams, 1992)
    """

    def __init__(self, decay: float = 0.9, kl: KL = KL(0.01), **kwargs: Any) -> None:
        super().__init__(
            advantage=Baseline(decay),
            level=token_level,
            gate=by_advantage(reinforce),
            aggregate=sequence_sum,
            clips=False,
            kl=kl,
            **kwargs,
        )
