"""Proximal policy optimisation with a ratio of each turn."""

from typing import Any, Literal

from grade_lightning.advantages import GAE
from grade_lightning.errors import check_range
from grade_lightning.functional.aggregation import sequence_mean, token_mean
from grade_lightning.functional.gates import clipped
from grade_lightning.gates import by_advantage
from grade_lightning.kl import KL
from grade_lightning.levels import turns_by
from grade_lightning.modules import PolicyGradientModule
from grade_lightning.terms import Critic


class TurnPPO(PolicyGradientModule):
    """PPO with one ratio for each turn, of an environment or between separators, that is clipped as a whole.

    Args:
        separator: where no environment numbers turns, each token whose text has this in it ends one. An empty one ends
            a turn with each token, which is PPO.
        mean: over each of the `sequences`, as the paper has it, or over all `tokens`, as PPO.
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
        separator: str = "\n",
        mean: Literal["sequences", "tokens"] = "sequences",
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
        aggregate = sequence_mean if mean == "sequences" else token_mean
        super().__init__(
            advantage=gae,
            critic=Critic(aggregate, gae.returns, epsilon_value, vf_coef, trunk),
            level=turns_by(separator),
            gate=by_advantage(clipped, low=1 - epsilon, high=1 + epsilon),
            aggregate=aggregate,
            clips=True,
            epochs=epochs,
            kl=kl,
            **kwargs,
        )
