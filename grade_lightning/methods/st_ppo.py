"""Stabilised turn-level PPO, and its form of tokens (S-PPO)."""

from typing import Any, Literal

from grade_lightning.advantages import GAE
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import token_level, turns_by
from grade_lightning.modules import ClipNormalizedModule
from grade_lightning.terms import Critic


class STPPO(ClipNormalizedModule):
    """TurnPPO whose gradient is divided by a measure of what the clip leaves out, if that is large.

    Args:
        ratio: of each `turn`; or of each `token`, which is S-PPO.
        normalizer: the size of what is left out `relative` to the whole gradient, or `absolute`.
        separator: where no environment numbers turns, each token whose text has this in it ends one.
        epsilon: the ratio is clipped to 1 ± ε.
        epsilon_value: a value moves by at most this much from what it was at the time of sampling.
        vf_coef: weight of the value loss.
        gamma: discount.
        lam: λ of the generalised advantage estimates.
        decay: of the moving average of the rewards that is taken off each reward.
        trunk: `shared`: the value loss trains the policy's network, too; `detached`: the value head alone.
        epochs: how often the completions of a window are used.
        kl: the KL to the reference.
        **kwargs: those of :class:`~grade_lightning.modules.PolicyGradientModule`.

    References:
        | ST-PPO: Stabilized Off-Policy Proximal Policy Optimization for Multi-Turn Agents Training (Li et al., 2025),
          https://arxiv.org/abs/2511.20718
    """

    def __init__(
        self,
        ratio: Literal["turn", "token"] = "turn",
        normalizer: Literal["relative", "absolute"] = "relative",
        separator: str = "\n",
        epsilon: float = 0.2,
        epsilon_value: float = 0.2,
        vf_coef: float = 0.1,
        gamma: float = 1.0,
        lam: float = 0.95,
        decay: float = 0.9,
        trunk: Literal["shared", "detached"] = "shared",
        epochs: int = 4,
        kl: KL = KL(0.05),
        **kwargs: Any,
    ) -> None:
        check_range("[0, inf]", epsilon=epsilon)
        gae = GAE(gamma, lam, decay)
        super().__init__(
            normalizer=normalizer,
            advantage=gae,
            critic=Critic(sequence_mean, gae.returns, epsilon_value, vf_coef, trunk),
            level=turns_by(separator) if ratio == "turn" else token_level,
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=sequence_mean,
            clips=True,
            epochs=epochs,
            kl=kl,
            **kwargs,
        )
